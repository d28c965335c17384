# SPDX-License-Identifier: Apache-2.0
"""Streams an answer of the embedded demo model from a simulated mesh of 8 devices."""

from meshwen import Qwen2ForCausalLM

QUESTION = "Ava has 12 apples. She buys 3 bags with 5 apples each. How many apples now?"

model = Qwen2ForCausalLM.from_pretrained("demo", mesh="1x8")
prompt = model.tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
for piece in model.stream(prompt, temperature=0):
    print(piece, end="", flush=True)
print()
