# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention (arXiv 2305.13245) by XLA: what a back end without a kernel does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Int, Int32, Shaped

from meshwen.ops.cache_layout import CacheLayout, axes_in_order
from meshwen.ops.dot import dot
from meshwen.ops.ordered import OrderedSums


@dataclass(frozen=True)
class RowTokens:
    """Tokens that follow one another in the rows of a batch; their keys are in rows, too.

    Attributes:
        start: int32 [B], the position of each row's first token.
        count: T, tokens of a row. Padding stands behind them, where none of them attends to it.
        length: S, the positions from 0 on that they may attend to: of the cache, or all T.
    """

    start: Array
    count: int
    length: int

    @property
    def positions(self) -> Int32[Array, "B T"]:
        """Of the tokens."""
        return self.start[:, None] + jnp.arange(self.count)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("start", "window", "array"),
    meta_fields=("length",),
)
@dataclass(frozen=True)
class CausalMask:
    """To which keys tokens attend: each to the last `window` ones up to its own.

    Attributes:
        start: int32 [B], the position of each sequence's first token; the others follow it.
        window: int32 [], at least 1.
        length: S; all these keys are at positions from 0 to S - 1.
        array: [B, T, S], of whatever dtype the back end's attention takes; None where its kernel
            reads no mask.
    """

    start: Array
    window: Array
    length: int
    array: Array | None

    def at(self, last: Int32[Array, " B"]) -> CausalMask:
        """Of one token of each sequence, the one at an index."""
        array = self.array
        if array is not None:
            array = jnp.take_along_axis(array, last.reshape(-1, 1, 1), axis=1)
        return replace(self, start=self.start + last, array=array)


def causal_mask(
    positions: Int[Array, "B T"], window: int | Array, length: int
) -> Bool[Array, "B T {length}"]:
    """Whether a token attends to the key at each position from 0 to `length` - 1."""
    query, key = positions[:, :, None], jnp.arange(length)
    return (key <= query) & (query - key < window)


def softmax_attention(
    q: Float32[Array, "B N T H"],
    keys: Float[Array, "B _ _ _"],
    values: Float[Array, "B _ _ _"],
    mask: Shaped[Array, "B T S"],
    layout: CacheLayout,
    exp: Callable[[Array], Array],
    sums: OrderedSums | None,
) -> Float32[Array, "B N T H"]:
    """softmax(q keys^T) values, each key/value head serving its G consecutive query heads.

    Args:
        q: of N = K*G heads, divided by sqrt(H).
        keys: float32 or bfloat16, of the sizes B, K, S, H in the order of `layout`.
        values: the same.
        mask: bool, true where a token attends to a key; or float32, added to scores.
        layout: of keys and values.
        exp: the function, as the numerics round it.
        sums: what adds in one order of additions; None: in any.
    """
    B, N, T, H = q.shape
    K, S = (keys.shape[layout.keys.index(axis)] for axis in "KS")
    rows = q.reshape(B, K, N // K * T, H)
    scores = _scores(rows, keys, layout, sums).reshape(B, K, N // K, T, S)
    scores = _masked(scores, mask)
    shifted = scores - scores.max(axis=-1, keepdims=True)
    weights = exp(shifted).reshape(B, K, N // K * T, S)
    y, total = weighted_values(weights, values, layout, sums)
    return (y / total).reshape(B, N, T, H)


def weighted_values(
    weights: Float32[Array, "B K R S"], values: Array, layout: CacheLayout, sums: OrderedSums | None
) -> tuple[Float32[Array, "B K R H"], Float32[Array, "B K R 1"]]:
    """Values summed with weights, and the weights summed.

    In one order of additions, zeros behind the last key that counts change nothing. The weights are
    summed by themselves: ones beside the values would have the values copied at every step.
    """
    if sums is None:
        total = weights.sum(axis=-1, keepdims=True)
        return _dot(weights.astype(values.dtype), values, layout.values, "S"), total
    weights = weights.astype(values.dtype)
    values = axes_in_order(values, layout.values, "BKSH")
    y = sums.ordered_matmul(weights, values, zeros_behind=True)
    total = sums.row_sums(weights.reshape(-1, weights.shape[-1]), zeros_behind=True)
    return y, total.reshape(*weights.shape[:-1], 1)


def _scores(
    q: Float32[Array, "B K R H"], keys: Array, layout: CacheLayout, sums: OrderedSums | None
) -> Float32[Array, "B K R S"]:
    """q keys^T, of R rows."""
    keys = keys.astype(jnp.float32)
    if sums is None:
        return _dot(q, keys, layout.keys, "H")
    return sums.ordered_matmul(q, axes_in_order(keys, layout.keys, "BKHS"))


def _masked(
    scores: Float32[Array, "B K G T S"], mask: Shaped[Array, "B T S"]
) -> Float32[Array, "B K G T S"]:
    """Scores, about the lowest number where a token does not attend to a key."""
    mask = mask[:, None, None]
    if mask.dtype == jnp.bool_:
        return jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return scores + mask


def _dot(a: Array, b: Array, axes: str, contracted: str) -> Array:
    """[B, K, R, c] times an array with such axes -> float32 [B, K, R, its other axis]."""
    batch = axes.index("B"), axes.index("K")
    return dot(a, b, (((3,), (axes.index(contracted),)), ((0, 1), batch)))
