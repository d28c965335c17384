# SPDX-License-Identifier: Apache-2.0
"""Matrix products by XLA whose order of additions does not depend on their shape.

The order must depend neither on the number of rows nor on how wide a device's part is. XLA's CPU
back end has two libraries, measured on jax 0.10 and 0.12 (AVX-512; AVX2 on jax 0.10):

- YNNPACK multiplies bfloat16 in one order for any number of rows from 2 up and columns from 64 up
  (from 16 for short sums), and zeros behind a sum change nothing. Operands have to lie in row-major
  order: XLA turns a transposition into another layout, which goes elsewhere. In float32 YNNPACK
  cuts the sum to suit its cache, by rows and columns.
- Eigen adds float32 products one after the other up to 304 of them, but may share a sum among
  threads, for some shapes, where a thread's share is more than 32 (`shouldShardByInnerDim`). Sums
  of up to 64 it never shares, however many threads there are. With AVX2 it adds them up in other
  orders where rows are not 1, 4, 16 or a multiple of 24, or columns no multiple of 16.

So float32 products are cut into sums of up to 64, padded so, handed to Eigen (YNNPACK refuses a
transposed left operand) and added in a tree; bfloat16 products are padded to 8 rows and 64 columns.
On other back ends the same programs run; whether their products keep their order, `meshwen verify`
finds out.

-0.0 and +0.0 are equal but different bits, and a cut tree may lose the sign of a zero. So every
result here has +0.0 in the place of -0.0.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import BFloat16, Float, Float32

from meshwen.ops.dot import batched, dot

Term = TypeVar("Term")  # an array; to show the order of additions, a text

_LONGEST_SUM = 64  # products that one float32 matmul adds up
_BFLOAT16_ROWS = 8  # at least: fewer are slower, and one would have another order
_BFLOAT16_COLUMNS = 64
# Of float32 matmuls: what is left over multiples of them would have another order.
_FLOAT32_ROWS, _FLOAT32_COLUMNS = 24, 16
_ONES = 32  # equal columns of a sum's product with ones: one column would have another order
# What partial sums may take; larger products go by blocks of rows, whose partial sums are still in
# the cache when they are added.
_PARTIAL_BYTES = 1 << 26


def matmul(x: Float[Array, "M c"], weight: Float[Array, "c N"]) -> Float32[Array, "M N"]:
    """x @ weight, x rounded to the weight's dtype."""
    if weight.dtype != jnp.float32:
        return bfloat16_matmul(x.astype(weight.dtype), weight)
    partials = -(-x.shape[1] // _LONGEST_SUM) * weight.shape[1]
    return by_blocks(lambda rows: float32_matmul(rows, weight), x, partials, _FLOAT32_ROWS)


def block_rows(dtype: jnp.dtype) -> int:
    """Of how many rows blocks of a matmul must be a multiple."""
    return _FLOAT32_ROWS if dtype == jnp.float32 else _BFLOAT16_ROWS


def row_sums(x: Float32[Array, "M c"]) -> Float32[Array, " M"]:
    """The sum of each row."""
    return float32_matmul(x, jnp.ones((x.shape[1], _ONES), jnp.float32))[:, 0]


def weighted_values(
    weights: Float32[Array, "B K R S"], values: Float[Array, "B K S H"]
) -> tuple[Float32[Array, "B K R H"], Float32[Array, "B K R 1"]]:
    """Values summed with weights, and the weights summed.

    Zeros behind the last position that counts change nothing: bfloat16 products are added from the
    left, float32 positions are cut into sums from the left. The weights are summed by a matmul of
    their own: ones beside the values would have the values copied at every step.
    """
    ones = jnp.ones((weights.shape[-1], _ONES), values.dtype)
    rows = weights.reshape(-1, weights.shape[-1])
    if values.dtype == jnp.float32:
        y = float32_matmul(weights, values, _LONGEST_SUM)
        total = float32_matmul(rows, ones, _LONGEST_SUM)
    else:
        y = bfloat16_matmul(weights.astype(values.dtype), values)
        total = bfloat16_matmul(rows.astype(values.dtype), ones)
    return y, total[:, :1].reshape(*weights.shape[:-1], 1)


def bfloat16_matmul(
    a: BFloat16[Array, "*batch M c"], b: BFloat16[Array, "*batch c N"]
) -> Float32[Array, "*batch M N"]:
    """a @ b."""
    M, N = a.shape[-2], b.shape[-1]
    a = pad(a, a.ndim - 2, max(0, _BFLOAT16_ROWS - M))
    b = pad(b, b.ndim - 1, max(0, _BFLOAT16_COLUMNS - N))
    a, b = (with_layout_constraint(x, Layout(tuple(range(x.ndim)))) for x in (a, b))
    return positive_zeros(batched(a, b)[..., :M, :N])


def float32_matmul(
    a: Float32[Array, "*batch M c"], b: Float32[Array, "*batch c N"], length: int = 0
) -> Float32[Array, "*batch M N"]:
    """a @ b, cut into sums of `length` from the left; 0: of one length that divides c."""
    (M, N), batch = (a.shape[-2], b.shape[-1]), a.ndim - 2
    a = jnp.swapaxes(pad(a, batch, _row_padding(M)), -1, -2)
    b = pad(b, batch + 1, -N % _FLOAT32_COLUMNS)
    # The barrier keeps XLA from folding the transposition into the product.
    a = lax.optimization_barrier(a)
    length = length or _sum_length(a.shape[batch])
    whole, rest = divmod(a.shape[batch], length)
    cut, sums = whole * length, []
    if whole:
        parts = [
            operand[..., :cut, :].reshape(*operand.shape[:batch], whole, length, operand.shape[-1])
            for operand in (a, b)
        ]
        sums.append(_transposed_matmul(*parts))
    if rest:
        sums.append(_transposed_matmul(*(o[..., None, cut:, :] for o in (a, b))))
    y = sums[0] if len(sums) == 1 else jnp.concatenate(sums, axis=batch)
    return tree_sum(y, axis=batch)[..., :M, :N]


def by_blocks(
    function: Callable[[Array], Array], x: Float[Array, "M c"], partials: int, multiple: int
) -> Float32[Array, "M N"]:
    """`function(x)`, for as many rows at a time as leave their partial sums in the cache.

    Args:
        function: [M, c] -> [M, N], rows apart.
        x: the rows.
        partials: float32 values that a row's result is the sum of.
        multiple: of how many rows blocks are.
    """
    rows, most = x.shape[0], max(multiple, _PARTIAL_BYTES // (4 * partials))
    count = -(-rows // most)
    if count == 1:
        return function(x)
    block = -(-rows // (count * multiple)) * multiple
    blocks = pad(x, 0, count * block - rows).reshape(count, block, x.shape[1])
    y = lax.map(function, blocks)
    return y.reshape(count * block, -1)[:rows]


def tree_sum(x: Float32[Array, "*shape"], axis: int) -> Float32[Array, "*others"]:
    """The sum over an axis, as a binary tree: neighbours first."""
    parts = [lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])]
    return positive_zeros(added_in_tree(parts))


def added_in_tree(terms: Sequence[Term], add: Callable[[Term, Term], Term] = operator.add) -> Term:
    """The sum of terms as a binary tree, neighbours first; an odd one out is kept for the end."""
    sums = list(terms)
    while len(sums) > 1:
        pairs = [add(sums[i], sums[i + 1]) for i in range(0, len(sums) - 1, 2)]
        sums = pairs + sums[2 * len(pairs) :]
    return sums[0]


def added_in_trees(
    terms: Sequence[Term],
    tree: tuple[int, ...],
    added: Callable[[Sequence[Term]], Term] = added_in_tree,
) -> Term:
    """The sum of a nested shape of terms: level by level, the last first; each a binary tree."""
    for size in reversed(tree):
        terms = [added(terms[i : i + size]) for i in range(0, len(terms), size)]
    (total,) = terms
    return total


def positive_zeros(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """`x` with +0.0 in the place of -0.0."""
    return jnp.where(x == 0, 0.0, x)


def pad(x: Array, axis: int, count: int) -> Array:
    """Zeros behind an axis."""
    if not count:
        return x
    return jnp.pad(x, [(0, count if i == axis else 0) for i in range(x.ndim)])


def _transposed_matmul(
    a: Float32[Array, "*batch c M"], b: Float32[Array, "*batch c N"]
) -> Float32[Array, "*batch M N"]:
    """a^T @ b."""
    batch = tuple(range(a.ndim - 2))
    return dot(a, b, (((a.ndim - 2,), (a.ndim - 2,)), (batch, batch)))


def _sum_length(length: int) -> int:
    """How many products to add up at once, so that no weight need be cut unevenly and copied.

    The most that divides `length`; but where these are few, the most.
    """
    most = min(length, _LONGEST_SUM)
    even = max(k for k in range(1, most + 1) if length % k == 0)
    return even if even >= _LONGEST_SUM // 8 else most


def _row_padding(rows: int) -> int:
    """Rows to add so that there are 1, 4, 16 or a multiple of 24: see `_FLOAT32_ROWS`."""
    few = [count for count in (1, 4, 16) if rows <= count]
    return few[0] - rows if few else -rows % _FLOAT32_ROWS
