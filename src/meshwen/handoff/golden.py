# SPDX-License-Identifier: Apache-2.0
"""One step of a program on known arguments: what another stack compares itself with."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from meshwen.handoff.plain import Plain
from meshwen.handoff.programs import Program, program
from meshwen.runtime.jax_settings import own_settings

_PROMPT = 8  # tokens before a decode step


def golden_step(step: Program, params: Plain) -> tuple[dict[str, Plain], dict[str, Plain]]:
    """Arguments, without the weights, and results, by name, on the host.

    Tokens are drawn from the vocabulary, the same every time. A decode step follows a prefill.

    Args:
        step: a program on a mesh with devices.
        params: plain weights on these.
    """
    batch, tokens = step.sizes.batch, step.sizes.tokens
    if step.name == "decode":
        inputs = _after_prompt(step, params, min(_PROMPT, step.sizes.length - 1))
    else:
        inputs = _inputs(step, _token_ids(step, batch, tokens))
    return inputs, jax.tree.map(np.asarray, run(step, params, inputs))


def run(step: Program, params: Plain, inputs: dict[str, Plain]) -> dict[str, Plain]:
    """The results of a program, by name.

    Args:
        step: the program.
        params: plain weights.
        inputs: the other arguments, by name, on the host.
    """

    def placed(array: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        # A copy: what is donated may share its memory with the host's array.
        return jax.device_put(np.array(array), shape.sharding)

    arguments = [jax.tree.map(placed, inputs[n], step.arguments[n]) for n in inputs]
    with own_settings():
        results = step.jitted()(params, *arguments)
    named = results if isinstance(results, tuple) else (results,)
    return dict(zip(step.results, named, strict=True))


def _after_prompt(step: Program, params: Plain, tokens: int) -> dict[str, Plain]:
    """Arguments of a decode step behind a prompt."""
    batch = step.sizes.batch
    ids = _token_ids(step, batch, tokens + 1)
    inputs = _inputs(step, ids[:, tokens:])
    if tokens:
        prefill = program(
            "prefill",
            step.model,
            profile=step.profile,
            batch=batch,
            tokens=tokens,
            length=step.sizes.length,
        )
        before = _inputs(prefill, ids[:, :tokens])
        inputs["cache"] = jax.tree.map(np.asarray, run(prefill, params, before)["cache"])
        if "positions" in inputs:
            inputs["positions"] = before["lengths"]
        else:
            inputs["position"] = np.array([tokens], np.int32)
    return inputs


def _inputs(step: Program, ids: np.ndarray) -> dict[str, Plain]:
    """Arguments without the weights, in order: the cache is empty, the tokens begin at 0."""
    batch, tokens = ids.shape
    values: dict[str, Any] = {
        "device": np.arange(step.model.plan.model_devices),
        "input_ids": ids,
        "lengths": np.maximum(tokens - np.arange(batch), 1),  # Of different lengths.
        "positions": np.arange(tokens) if step.profile == "portable" else np.zeros(batch),
        "position": np.zeros(1),
        "last": np.array([max(tokens - 2, 0)]),  # Not that of the last column.
    }
    found = {}
    for name, shapes in list(step.arguments.items())[1:]:
        if name == "cache":
            found[name] = jax.tree.map(lambda one: np.zeros(one.shape, one.dtype), shapes)
        else:
            found[name] = values[name].astype(np.int32)
    return found


def _token_ids(step: Program, batch: int, tokens: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, step.model.config.vocab_size, (batch, tokens))
