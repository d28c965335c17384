# SPDX-License-Identifier: Apache-2.0
"""Scores a text: the log-probability of each of its tokens, from one forward pass."""

import jax
import jax.numpy as jnp
import numpy as np

from meshwen import Qwen2ForCausalLM

model = Qwen2ForCausalLM.from_pretrained("demo", mesh="2x4", dtype="float32")
prompt = model.tokenizer.encode_chat(
    [{"role": "user", "content": "A box holds 6 eggs. How many eggs are in 4 boxes?"}]
)
input_ids = np.array([prompt + model.tokenizer.encode("6 * 4 = 24")])

logits = model(input_ids)  # float32 [batch, sequence, vocab], the vocabulary split over the mesh
logprobs = jax.nn.log_softmax(logits[:, :-1])
chosen = jnp.take_along_axis(logprobs, input_ids[:, 1:, None], axis=-1)[0, :, 0]
for token, logprob in zip(input_ids[0, 1:], chosen, strict=True):
    print(f"{model.tokenizer.id_to_token(int(token))!r:20} {float(logprob):8.3f}")
