# SPDX-License-Identifier: Apache-2.0
"""Trains the demo model for some steps, on a mesh and on one device, which give the same losses.

It needs optax: the extra `train`.
"""

import jax
import jax.numpy as jnp
import optax

from meshwen import Tokenizer
from meshwen.checkpoints import open_checkpoint
from meshwen.handoff import forward, load_weights, parallel_model

MESHES = ("1x8", "1")  # The largest first: it sets how many devices there are.
TEXT = "Maya buys 4 books at $7 each. 4*7=28 dollars. She pays with $50 and gets 22 dollars back."
STEPS = 4


def losses(mesh: str) -> list[float]:
    model = parallel_model("demo", mesh, dtype="float32")
    with open_checkpoint("demo") as checkpoint:
        token_ids = jnp.array([Tokenizer.from_checkpoint(checkpoint).encode(TEXT)])
        params = load_weights(model, checkpoint)
    optimiser = optax.adamw(1e-4)

    def loss(params):
        logits, labels = forward(model, params, token_ids[:, :-1]), token_ids[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step, donate_argnums=(0, 1), compiler_options=model.compiler_options)
    state, found = optimiser.init(params), []
    for _ in range(STEPS):
        params, state, value = step(params, state)
        found.append(float(value))
    return found


on_meshes = [losses(mesh) for mesh in MESHES]
for number, values in enumerate(zip(*on_meshes, strict=True), 1):
    shown = [f"{mesh}: {value:.4f}" for mesh, value in zip(MESHES, values, strict=True)]
    print(f"step {number}:", ", ".join(shown))
