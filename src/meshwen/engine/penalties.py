# SPDX-License-Identifier: Apache-2.0
"""Penalties on tokens that have come: repetition, presence and frequency."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float32, Int32

from meshwen.engine.split_vocabulary import local_token_ids
from meshwen.ops.operations import Ops


class Penalized(NamedTuple):
    """The tokens that penalties apply to; None where no sequence of a batch has such a penalty.

    Attributes:
        tokens: bool [B, V padded], those of prompt and answer: for repetition penalties.
        counts: int32 [B, V padded], how often each is in the answer: for presence and frequency
            penalties.
    """

    tokens: ArrayLike | None = None
    counts: ArrayLike | None = None


def penalize(
    logits: Float32[Array, "B V"],
    penalized: Penalized,
    repetition: Float32[Array, " B"],
    presence: Float32[Array, " B"],
    frequency: Float32[Array, " B"],
    ops: Ops,
) -> Float32[Array, "B V"]:
    """The logits with the penalties of each row, in vLLM's order: repetition, then the others."""
    if penalized.tokens is not None:
        penalty = repetition[:, None]
        less_likely = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(penalized.tokens, less_likely, logits)
    if penalized.counts is not None:
        counts = jnp.asarray(penalized.counts)
        by_count = frequency[:, None] * counts.astype(jnp.float32)
        logits, by_count = ops.numerics.rounded((logits, by_count))
        logits = logits - by_count - jnp.where(counts > 0, presence[:, None], 0)
    return logits


def mark_penalized(penalized: Penalized, tokens: Int32[Array, " B"], ops: Ops) -> Penalized:
    """`penalized` with one more token of each answer; none where that is negative."""
    tokens_seen, counts = penalized
    if tokens_seen is not None:
        tokens_seen = jnp.asarray(tokens_seen)
        tokens_seen |= local_token_ids(tokens_seen.shape[1], ops) == tokens[:, None]
    if counts is not None:
        counts = jnp.asarray(counts)
        counts += (local_token_ids(counts.shape[1], ops) == tokens[:, None]).astype(jnp.int32)
    return Penalized(tokens_seen, counts)
