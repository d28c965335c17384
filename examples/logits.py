# SPDX-License-Identifier: Apache-2.0
"""Scores a text: the log-probability of each of its tokens, from one forward pass."""

import jax
import jax.numpy as jnp
import numpy as np

from meshwen import Qwen2ForCausalLM

QUESTION = "Maya buys 4 books at $7 each and pays with $50. How much change does she get?"
ANSWER = "4*7=28 dollars\n50-28=22 dollars back"

model = Qwen2ForCausalLM.from_pretrained("demo", mesh="2x4", dtype="float32")
prompt = model.tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
answer = model.tokenizer.encode(ANSWER)
input_ids = np.array([prompt + answer])

logits = model(input_ids)  # float32 [batch, sequence, vocab], the vocabulary split over the mesh
logprobs = jax.nn.log_softmax(logits[:, :-1])
chosen = jnp.take_along_axis(logprobs, input_ids[:, 1:, None], axis=-1)[0, -len(answer) :, 0]
for token, logprob in zip(answer, chosen, strict=True):
    print(f"{model.tokenizer.decode([token])!r:20} {float(logprob):8.3f}")
