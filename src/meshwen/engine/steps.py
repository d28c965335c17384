# SPDX-License-Identifier: Apache-2.0
"""The steps of generation, as each device computes them: pure functions under `shard_map`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32, Int32

from meshwen.cache.kv_cache import KVCache
from meshwen.engine.penalties import Penalized, mark_penalized
from meshwen.engine.sampling import NO_TOKEN, Sampled, SamplerRows, SamplingMethod, sample
from meshwen.engine.step_inputs import StepInputs
from meshwen.models.parallel_model import ParallelModel
from meshwen.ops.attention import RowTokens
from meshwen.ops.paged import PagedTokens
from meshwen.weights.declaration import Params


def logits_step(
    params: Params, token_ids: Int32[Array, "B T"], *, model: ParallelModel
) -> Float32[Array, "B T V"]:
    """Logits of whole sequences."""
    B, T = token_ids.shape
    tokens = RowTokens(jnp.zeros(B, jnp.int32), T, T)
    x, _ = model.hidden_states(params, token_ids, tokens, None)
    return model.logits(params, x)


def forward_step(
    params: Params,
    cache: KVCache,
    inputs: StepInputs,
    *,
    model: ParallelModel,
) -> tuple[Float32[Array, "asked D"], KVCache]:
    """Final hidden states of tokens of sequences, and the cache with all of them.

    The states are those of the tokens asked for (where none is, of any), or of all.

    Args:
        params: this device's weights.
        cache: KV blocks.
        inputs: the tokens.
        model: the model.
    """
    token_ids, asked = inputs.token_ids, inputs.asked
    index = None if asked is None else jnp.maximum(asked, 0)
    tokens = PagedTokens.of(*inputs.where, model.backend.block_size)
    return model.hidden_states(params, token_ids, tokens, cache, last=index)


def sampling_step(
    params: Params,
    cache: KVCache,
    inputs: StepInputs,
    rows: SamplerRows,
    penalized: Penalized | None,
    *,
    method: SamplingMethod,
    model: ParallelModel,
) -> tuple[Sampled, Penalized | None, KVCache]:
    """The tokens that follow some tokens of sequences: see `ModelRunner.step`."""
    x, cache = forward_step(params, cache, inputs, model=model)
    sampled, penalized = _sampled(params, x, inputs, rows, penalized, method=method, model=model)
    return sampled, penalized, cache


def sample_step(
    params: Params,
    hidden: Float32[Array, "N D"],
    inputs: StepInputs,
    rows: SamplerRows,
    penalized: Penalized | None,
    *,
    method: SamplingMethod,
    model: ParallelModel,
) -> tuple[Sampled, Penalized | None]:
    """What `sampling_step` samples, from final hidden states: see `ModelRunner.sample`."""
    x = hidden[jnp.maximum(inputs.asked, 0)]
    return _sampled(params, x, inputs, rows, penalized, method=method, model=model)


def _sampled(
    params: Params,
    x: Float32[Array, "B D"],
    inputs: StepInputs,
    rows: SamplerRows,
    penalized: Penalized | None,
    *,
    method: SamplingMethod,
    model: ParallelModel,
) -> tuple[Sampled, Penalized | None]:
    """What follows the tokens asked for, whose hidden states are x."""
    asked = inputs.asked
    positions = inputs.positions[jnp.maximum(asked, 0)] + 1
    if inputs.sampler_rows is not None:
        owned, forbidden = rows._replace(forbidden=None), rows.forbidden
        owned = jax.tree.map(lambda parameter: parameter[inputs.sampler_rows], owned)
        rows = owned._replace(forbidden=forbidden)  # It has a row for each sample as it is.
    vocab_size, logits = model.config.vocab_size, model.logits(params, x)
    sampled = sample(logits, rows, positions, penalized, vocab_size, method, model.ops)
    if penalized is not None:
        drawn = jnp.where(asked < 0, NO_TOKEN, sampled.tokens)
        penalized = mark_penalized(penalized, drawn, model.ops)
    return sampled, penalized


def head_step(params: Params, hidden: Array, *, model: ParallelModel) -> Array:
    """Logits of final hidden states: float32 [B, D] -> float32 [B, V/n]."""
    return model.logits(params, hidden)
