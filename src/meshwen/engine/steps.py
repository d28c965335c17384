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
    token_ids: Int32[Array, " N"],
    positions: Int32[Array, " N"],
    query_starts: Int32[Array, " R1"],
    lengths: Int32[Array, " R"],
    tables: Int32[Array, "R W"],
    asked: Int32[Array, " B"] | None,
    *,
    model: ParallelModel,
) -> tuple[Float32[Array, "asked D"], KVCache]:
    """Final hidden states of some tokens of sequences, and the cache with all of them.

    Args:
        params: this device's weights.
        cache: KV blocks.
        token_ids: of the tokens.
        positions, query_starts, lengths, tables: see `meshwen.ops.paged.PagedTokens`.
        asked: indices of the tokens whose states are asked for, at least 0; None: all.
        model: the model.
    """
    tokens = PagedTokens.of(positions, query_starts, lengths, tables, model.backend.block_size)
    return model.hidden_states(params, token_ids, tokens, cache, last=asked)


def sampling_step(
    params: Params,
    cache: KVCache,
    token_ids: Int32[Array, " N"],
    positions: Int32[Array, " N"],
    query_starts: Int32[Array, " R1"],
    lengths: Int32[Array, " R"],
    tables: Int32[Array, "R W"],
    asked: Int32[Array, " B"],
    sampler_rows: Int32[Array, " B"] | None,
    rows: SamplerRows,
    penalized: Penalized | None,
    *,
    method: SamplingMethod,
    model: ParallelModel,
) -> tuple[Sampled, Penalized | None, KVCache]:
    """The tokens that follow some tokens of sequences: see `ModelRunner.step`."""
    index = jnp.maximum(asked, 0)
    x, cache = forward_step(
        params, cache, token_ids, positions, query_starts, lengths, tables, index, model=model
    )
    following = positions[index] + 1
    if sampler_rows is not None:
        rows = jax.tree.map(lambda parameter: parameter[sampler_rows], rows)
    sampled, penalized = _sampled(
        params, x, following, asked, rows, penalized, method=method, model=model
    )
    return sampled, penalized, cache


def sample_step(
    params: Params,
    hidden: Float32[Array, "N D"],
    positions: Int32[Array, " N"],
    asked: Int32[Array, " B"],
    rows: SamplerRows,
    penalized: Penalized | None,
    *,
    method: SamplingMethod,
    model: ParallelModel,
) -> tuple[Sampled, Penalized | None]:
    """What `sampling_step` samples, from the final hidden states of all tokens of a step."""
    index = jnp.maximum(asked, 0)
    x, following = hidden[index], positions[index] + 1
    return _sampled(params, x, following, asked, rows, penalized, method=method, model=model)


def _sampled(
    params: Params,
    x: Float32[Array, "B D"],
    positions: Int32[Array, " B"],
    asked: Int32[Array, " B"],
    rows: SamplerRows,
    penalized: Penalized | None,
    *,
    method: SamplingMethod,
    model: ParallelModel,
) -> tuple[Sampled, Penalized | None]:
    """The token at each position, which follows hidden states."""
    vocab_size, logits = model.config.vocab_size, model.logits(params, x)
    sampled = sample(logits, rows, positions, penalized, vocab_size, method, model.ops)
    if penalized is not None:
        drawn = jnp.where(asked < 0, NO_TOKEN, sampled.tokens)
        penalized = mark_penalized(penalized, drawn, model.ops)
    return sampled, penalized


def head_step(params: Params, hidden: Array, *, model: ParallelModel) -> Array:
    """Logits of final hidden states: float32 [B, D] -> float32 [B, V/n]."""
    return model.logits(params, hidden)
