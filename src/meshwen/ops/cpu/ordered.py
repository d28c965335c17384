# SPDX-License-Identifier: Apache-2.0
"""Matmuls by XLA's CPU back end whose order of additions does not depend on their shape.

It has two libraries, measured on jax 0.10 and 0.12 (AVX-512; AVX2 on jax 0.10):

- YNNPACK multiplies bfloat16 in one order for any number of rows from 2 up and columns from 64 up
  (from 16 for short sums), and zeros behind a sum change nothing. Operands have to lie in row-major
  order: XLA turns a transposition into another layout, which goes elsewhere. In float32 YNNPACK
  cuts the sum to suit its cache, by rows and columns.
- Eigen adds float32 products one after the other up to 304 of them, but may share a sum among
  threads, for some shapes, where a thread's share is more than 32 (`shouldShardByInnerDim`). Sums
  of up to 64 it never shares, however many threads there are. With AVX2 it adds them up in other
  orders where rows are not 1, 4, 16 or a multiple of 24, or columns no multiple of 16.

So float32 matmuls are cut into sums of up to 64, padded so, handed to Eigen (YNNPACK refuses a
transposed left operand) and added in a tree; bfloat16 matmuls are padded to 8 rows and 64 columns.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import BFloat16, Float, Float32

from meshwen.ops.dot import batched
from meshwen.ops.ordered import by_blocks, cut_matmul, even_length, pad, positive_zeros

_EIGEN_SUM = 64  # products that one float32 matmul adds up
_YNNPACK_ROWS = 8  # at least: fewer are slower, and one would have another order
_YNNPACK_COLUMNS = 64
# Of float32 matmuls: what is left over multiples of them would have another order.
_EIGEN_ROWS, _EIGEN_COLUMNS = 24, 16
_ONES = 32  # equal columns of a sum's matmul with ones: one column would have another order


def matmul(x: Float[Array, "M c"], weight: Float[Array, "c N"]) -> Float32[Array, "M N"]:
    """x @ weight, x rounded to the weight's dtype."""
    if weight.dtype != jnp.float32:
        return _bfloat16_matmul(x.astype(weight.dtype), weight)
    partials = -(-x.shape[1] // _EIGEN_SUM) * weight.shape[1]
    return by_blocks(lambda rows: _float32_matmul(rows, weight), x, partials, _EIGEN_ROWS)


def batched_matmul(
    a: Float[Array, "*batch M c"], b: Float[Array, "*batch c N"], zeros_behind: bool = False
) -> Float32[Array, "*batch M N"]:
    """a @ b, of one dtype: see `meshwen.ops.ordered.OrderedSums`.

    bfloat16 products are added from the left, so zeros behind change nothing; float32 products
    where they are cut from the left.
    """
    if b.dtype != jnp.float32:
        return _bfloat16_matmul(a, b)
    return _float32_matmul(a, b, _EIGEN_SUM if zeros_behind else None)


def row_sums(x: Float[Array, "M c"], zeros_behind: bool = False) -> Float32[Array, " M"]:
    """The sum of each row."""
    return batched_matmul(x, jnp.ones((x.shape[1], _ONES), x.dtype), zeros_behind)[:, 0]


def block_rows(dtype: jnp.dtype) -> int:
    """Of how many rows blocks of a matmul must be a multiple."""
    return _EIGEN_ROWS if dtype == jnp.float32 else _YNNPACK_ROWS


def _bfloat16_matmul(
    a: BFloat16[Array, "*batch M c"], b: BFloat16[Array, "*batch c N"]
) -> Float32[Array, "*batch M N"]:
    """a @ b."""
    M, N = a.shape[-2], b.shape[-1]
    a = pad(a, a.ndim - 2, max(0, _YNNPACK_ROWS - M))
    b = pad(b, b.ndim - 1, max(0, _YNNPACK_COLUMNS - N))
    a, b = (with_layout_constraint(x, Layout(tuple(range(x.ndim)))) for x in (a, b))
    return positive_zeros(batched(a, b)[..., :M, :N])


def _float32_matmul(
    a: Float32[Array, "*batch M c"], b: Float32[Array, "*batch c N"], length: int | None = None
) -> Float32[Array, "*batch M N"]:
    """a @ b, cut into sums of `length` from the left; None: of one length that divides c."""
    (M, N), batch = (a.shape[-2], b.shape[-1]), a.ndim - 2
    a = jnp.swapaxes(pad(a, batch, _row_padding(M)), -1, -2)
    b = pad(b, batch + 1, -N % _EIGEN_COLUMNS)
    # The barrier keeps XLA from folding the transposition into the matmul.
    a = lax.optimization_barrier(a)
    length = length or even_length(a.shape[batch], _EIGEN_SUM)
    return cut_matmul(a, b, length)[..., :M, :N]


def _row_padding(rows: int) -> int:
    """Rows to add so that there are 1, 4, 16 or a multiple of 24: see `_EIGEN_ROWS`."""
    few = [count for count in (1, 4, 16) if rows <= count]
    return few[0] - rows if few else -rows % _EIGEN_ROWS
