# SPDX-License-Identifier: Apache-2.0
"""Sums whose order of additions does not depend on the shape of what is computed.

The order must depend neither on the number of rows nor on how wide a device's part is. XLA leaves
the order inside a matmul to a library, which chooses by shape. So a matmul is cut into sums that
are too short to be cut by a library, and their results are added here, in a binary tree. What else
the libraries of one back end need is that back end's: see `meshwen.ops.cpu.ordered`. Whether those
of another keep the order of a short sum, `meshwen verify` finds out.

-0.0 and +0.0 are equal but different bits, and a cut tree may lose the sign of a zero. So every
result here has +0.0 in the place of -0.0.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32

from meshwen.ops.dot import dot

Term = TypeVar("Term")  # an array; to show the order of additions, a text

LONGEST_SUM = 64  # products that one matmul adds up
# What partial sums may take; larger matmuls go by blocks of rows, whose partial sums are still in
# the cache when they are added.
_PARTIAL_BYTES = 1 << 26


@runtime_checkable  # For checks of shapes.
class OrderedSums(Protocol):
    """Sums of activations in one order of additions; back ends have them.

    With `zeros_behind`, any number of zeros may also follow the terms of a sum without changing it.
    """

    def ordered_matmul(
        self,
        a: Float[Array, "*batch M c"],
        b: Float[Array, "*batch c N"],
        *,
        zeros_behind: bool = False,
    ) -> Float32[Array, "*batch M N"]:
        """a @ b, of one dtype."""

    def row_sums(
        self, x: Float[Array, "M c"], *, zeros_behind: bool = False
    ) -> Float32[Array, " M"]:
        """The sum of each row."""


def matmul(x: Float[Array, "M c"], weight: Float[Array, "c N"]) -> Float32[Array, "M N"]:
    """x @ weight, x rounded to the weight's dtype."""
    x, partials = x.astype(weight.dtype), -(-x.shape[1] // LONGEST_SUM) * weight.shape[1]
    return by_blocks(lambda rows: batched_matmul(rows, weight), x, partials)


def batched_matmul(
    a: Float[Array, "*batch M c"], b: Float[Array, "*batch c N"], zeros_behind: bool = False
) -> Float32[Array, "*batch M N"]:
    """a @ b, of one dtype: see `OrderedSums`."""
    length = LONGEST_SUM if zeros_behind else even_length(a.shape[-1], LONGEST_SUM)
    return cut_matmul(jnp.swapaxes(a, -1, -2), b, length)


def row_sums(x: Float[Array, "M c"]) -> Float32[Array, " M"]:
    """The sum of each row; zeros behind do not change it."""
    # The barrier keeps what was rounded to bfloat16 so: a compiler may drop conversions and back.
    x = lax.optimization_barrier(x)
    return positive_zeros(long_tree_sum(x.astype(jnp.float32)))[:, 0]


def cut_matmul(
    a: Float[Array, "*batch c M"], b: Float[Array, "*batch c N"], length: int
) -> Float32[Array, "*batch M N"]:
    """a^T @ b, cut into sums of `length` from the left, which are added in a tree."""
    batch = a.ndim - 2
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
    return tree_sum(y, axis=batch)


def even_length(length: int, most: int) -> int:
    """Into sums of how many products to cut one of `length`, so that no weight has to be copied.

    The most that divides `length`; but where these are few, `most`.
    """
    most = min(length, most)
    even = max(k for k in range(1, most + 1) if length % k == 0)
    return even if 8 * even >= most else most


def by_blocks(
    function: Callable[[Array], Array], x: Float[Array, "M c"], partials: int, multiple: int = 1
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


def long_tree_sum(x: Float32[Array, "M c"]) -> Float32[Array, "M 1"]:
    """The sum of each row in the order of `tree_sum`, but -0.0; zeros behind do not change it.

    A level at a time: the program of `tree_sum` has an addition a term.
    """
    while x.shape[1] > 1:
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2)))
        x = x[:, ::2] + x[:, 1::2]
    return x


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


@jax.custom_jvp
def positive_zeros(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """`x` with +0.0 in the place of -0.0; its derivative is that of `x`, at zeros too."""
    return jnp.where(x == 0, 0.0, x)


positive_zeros.defjvps(lambda tangent, _, x: tangent)


def pad(x: Array, axis: int, count: int) -> Array:
    """Zeros behind an axis."""
    if not count:
        return x
    return jnp.pad(x, [(0, count if i == axis else 0) for i in range(x.ndim)])


def _transposed_matmul(
    a: Float[Array, "*batch c M"], b: Float[Array, "*batch c N"]
) -> Float32[Array, "*batch M N"]:
    """a^T @ b."""
    batch = tuple(range(a.ndim - 2))
    return dot(a, b, (((a.ndim - 2,), (a.ndim - 2,)), (batch, batch)))
