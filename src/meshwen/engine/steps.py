# SPDX-License-Identifier: Apache-2.0
"""The steps of generation, as each device computes them: pure functions under `shard_map`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from meshwen.cache.kv_cache import KVCache, SequenceCache
from meshwen.engine.penalties import Penalized, mark_penalized
from meshwen.engine.sampling import Sampled, SamplerRows, SamplingMethod, sample
from meshwen.models.parallel_model import ParallelModel
from meshwen.weights.declaration import Params


def logits_step(params: Params, token_ids: Array, *, model: ParallelModel) -> Array:
    """Logits of whole sequences: int32 [B, T] -> float32 [B, T, V/n]."""
    B, T = token_ids.shape
    x, _ = model.hidden_states(params, token_ids, jnp.zeros(B, jnp.int32), None, T)
    return model.logits(params, x)


def prefill_step(
    params: Params,
    cache: KVCache,
    hidden: Array,
    token_ids: Array,
    rows: Array,
    start: Array,
    lengths: Array,
    *,
    length: int,
    parts: int,
    model: ParallelModel,
) -> tuple[Array, KVCache]:
    """A chunk of a prompt into the cache: see `ModelRunner.prefill`."""
    T, row = token_ids.shape[1], rows[0]
    writes = lengths[0] > start
    # A prompt that is the only one is never over; to select costs a copy of the cache.
    sequence = tuple(SequenceCache(layer, row, writes if parts > 1 else None) for layer in cache)
    end = lengths - 1 - start
    last = jnp.clip(end, 0, T - 1)
    x, sequence = model.hidden_states(params, token_ids, start[None], sequence, length, last=last)
    hidden = jnp.where((writes & (end < T))[:, None], x[0], hidden)
    return hidden, tuple(one.layer for one in sequence)


def first_step(
    params: Params,
    hidden: Array,
    positions: Array,
    rows: SamplerRows,
    penalized: Penalized | None,
    *,
    method: SamplingMethod,
    model: ParallelModel,
) -> Sampled:
    """The token after each hidden state float32 [B, D], at positions int32 [B]."""
    vocab_size, logits = model.config.vocab_size, model.logits(params, hidden)
    return sample(logits, rows, positions, penalized, vocab_size, method, model.ops)


def decode_step(
    params: Params,
    cache: KVCache,
    tokens: Array,
    positions: Array,
    rows: SamplerRows,
    penalized: Penalized | None,
    *,
    method: SamplingMethod,
    model: ParallelModel,
) -> tuple[Sampled, Penalized | None, KVCache]:
    """One step of every sequence: see `ModelRunner.decode`."""
    B, T = tokens.shape
    x, new_cache = decode_hidden_states(params, cache, tokens, positions, model=model)
    following = (positions[:, None] + 1 + jnp.arange(T)).reshape(-1)
    rows = jax.tree.map(lambda row: jnp.repeat(row, T, axis=0), rows)
    hidden = x.reshape(B * T, -1)
    sampled = first_step(params, hidden, following, rows, penalized, method=method, model=model)
    if penalized is not None:
        penalized = mark_penalized(penalized, sampled.tokens, model.ops)
    sampled = jax.tree.map(lambda row: row.reshape(B, T, *row.shape[1:]), sampled)
    return sampled, penalized, new_cache


def decode_logits_step(
    params: Params, cache: KVCache, tokens: Array, positions: Array, *, model: ParallelModel
) -> tuple[Array, KVCache]:
    """A decode step with logits in the sampler's place: [B, T] tokens -> float32 [B, T, V/n]."""
    x, cache = decode_hidden_states(params, cache, tokens, positions, model=model)
    return model.logits(params, x), cache


def head_step(params: Params, hidden: Array, *, model: ParallelModel) -> Array:
    """Logits of final hidden states: float32 [B, D] -> float32 [B, V/n]."""
    return model.logits(params, hidden)


def decode_hidden_states(
    params: Params, cache: KVCache, tokens: Array, positions: Array, *, model: ParallelModel
) -> tuple[Array, KVCache]:
    """Hidden states float32 [B, T, D] of tokens [B, T] from positions [B] on, and the cache."""
    length = cache[0].length(model.backend.cache_layout)
    return model.hidden_states(params, tokens, positions, cache, length)
