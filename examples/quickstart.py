# SPDX-License-Identifier: Apache-2.0
"""Streams an answer of the embedded demo model from a simulated mesh of 8 devices."""

from meshwen import Qwen2ForCausalLM

QUESTION = "Maya buys 4 books at $7 each and pays with $50. How much change does she get?"

model = Qwen2ForCausalLM.from_pretrained("demo", mesh="1x8")
prompt = model.tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
for piece in model.stream(prompt, temperature=0):
    print(piece, end="", flush=True)
print()
