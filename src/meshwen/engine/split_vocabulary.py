# SPDX-License-Identifier: Apache-2.0
"""What is looked for in a vocabulary that is split over the devices, without gathering it."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float32, Int32, Integer, Num

from meshwen.ops.operations import Ops


def local_token_ids(count: int, ops: Ops) -> Int32[Array, " {count}"]:
    """The ids of this device's part of the vocabulary, which has `count`."""
    return ops.collectives.index() * count + jnp.arange(count, dtype=jnp.int32)


def without_padding(
    logits: Float32[Array, "B V"], ids: Int32[Array, " V"], vocab_size: int, ops: Ops
) -> Float32[Array, "B V"]:
    """The logits, those of ids beyond the vocabulary -inf."""
    if ops.collectives.devices * logits.shape[1] == vocab_size:
        return logits
    return jnp.where(ids < vocab_size, logits, -jnp.inf)


def likeliest(
    logits: Float32[Array, "B V"], ids: Int32[Array, " V"], count: int, ops: Ops
) -> tuple[Float32[Array, "B {count}"], Int32[Array, "B {count}"]]:
    """The `count` largest logits of the whole vocabulary and their ids, largest first.

    Equal logits stand in the order of their ids: on each device, and between devices because they
    are gathered in the order of the vocabulary.
    """
    values, local = _largest(logits, count, ops)
    choices = ids[local]
    if ops.collectives.axes:
        values = ops.collectives.all_gather(values, axis=1)
        choices = ops.collectives.all_gather(choices, axis=1)
        values, order = _largest(values, count, ops)
        choices = jnp.take_along_axis(choices, order, axis=1)
    return values, choices


def _largest(
    x: Num[Array, "B N"], count: int, ops: Ops
) -> tuple[Num[Array, "B few"], Integer[Array, "B few"]]:
    """The `count` largest numbers of each row, or all N, and their places."""
    if count > 1:
        values, places = lax.top_k(x, min(count, x.shape[1]))
        return values, places
    return ops.backend.largest(x)
