# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention (arXiv 2305.13245) by XLA; back ends may have a kernel in its place."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Shaped

from meshwen.ops.backend import CacheLayout
from meshwen.ops.dot import dot
from meshwen.ops.operations import Ops


def softmax_attention(
    q: Float32[Array, "B N T H"],
    keys: Float[Array, "B _ _ _"],
    values: Float[Array, "B _ _ _"],
    mask: Shaped[Array, "B T S"],
    ops: Ops,
) -> Float32[Array, "B N T H"]:
    """softmax(q keys^T) values, each key/value head serving its G consecutive query heads.

    Args:
        q: of N = K*G heads, divided by sqrt(H).
        keys: float32 or bfloat16, of the sizes B, K, S, H in the order of the back end's cache.
        values: the same.
        mask: what a query sees, from the back end's `mask`.
        ops: the operations.
    """
    layout = ops.backend.cache_layout
    B, N, T, H = q.shape
    K, S = (keys.shape[layout.keys.index(axis)] for axis in "KS")
    rows = q.reshape(B, K, N // K * T, H)
    scores = _scores(rows, keys, layout, ops).reshape(B, K, N // K, T, S)
    scores = ops.backend.masked(scores, mask)
    shifted = scores - scores.max(axis=-1, keepdims=True)
    weights = ops.numerics.pointwise(jnp.exp, shifted).reshape(B, K, N // K * T, S)
    y, total = weighted_values(weights, values, layout, ops)
    return (y / total).reshape(B, N, T, H)


def _scores(
    q: Float32[Array, "B K R H"], keys: Array, layout: CacheLayout, ops: Ops
) -> Float32[Array, "B K R S"]:
    """q keys^T, of R rows."""
    keys = keys.astype(jnp.float32)
    if ops.numerics.ordered:
        return ops.backend.ordered_matmul(q, axes_in_order(keys, layout.keys, "BKHS"))
    return _dot(q, keys, layout.keys, "H")


def weighted_values(
    weights: Float32[Array, "B K R S"], values: Array, layout: CacheLayout, ops: Ops
) -> tuple[Float32[Array, "B K R H"], Float32[Array, "B K R 1"]]:
    """Values summed with weights, and the weights summed.

    In exact numerics zeros behind the last position that counts change nothing. The weights are
    summed by themselves: ones beside the values would have the values copied at every step.
    """
    if ops.numerics.ordered:
        weights = weights.astype(values.dtype)
        values = axes_in_order(values, layout.values, "BKSH")
        y = ops.backend.ordered_matmul(weights, values, zeros_behind=True)
        rows = weights.reshape(-1, weights.shape[-1])
        total = ops.backend.row_sums(rows, zeros_behind=True)
        return y, total.reshape(*weights.shape[:-1], 1)
    total = weights.sum(axis=-1, keepdims=True)
    return _dot(weights.astype(values.dtype), values, layout.values, "S"), total


def _dot(a: Array, b: Array, axes: str, contracted: str) -> Array:
    """[B, K, R, c] times an array with such axes -> float32 [B, K, R, its other axis]."""
    batch = axes.index("B"), axes.index("K")
    return dot(a, b, (((3,), (axes.index(contracted),)), ((0, 1), batch)))


def axes_in_order(x: Array, axes: str, order: str) -> Array:
    """`x`, whose axes are named by letters, with them in another order."""
    return x if axes == order else x.transpose([axes.index(axis) for axis in order])
