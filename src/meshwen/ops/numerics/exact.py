# SPDX-License-Identifier: Apache-2.0
"""Exact numerics: the same bits on every mesh, whatever else is in the batch.

Floating-point addition is not associative, so a result is a matter of the order of its additions.
Here that order is fixed by the model alone, never by the mesh, the batch or the padding:

- What is split over devices is cut into *leaves* that are the same on every mesh: the query heads,
  32 slices of the MLP's inner dimension, 32 slices of the vocabulary. Leaves are added in a binary
  tree, neighbours first. A device owns an aligned run of leaves, a subtree, and adds it by itself.
  The top of the tree crosses devices: every device gets its share of the partial sums of all
  (all-to-all), adds them in tree order, and the shares are gathered. There is no floating-point
  all-reduce, whose order XLA leaves open. An addend of zero (a padded leaf) changes nothing, so a
  tree may be cut short.
- Inside a leaf the back end decides: `meshwen.ops.ordered` where XLA multiplies, on CPUs
  `meshwen.ops.cpu.ordered`, and the kernels (`meshwen.ops.cpu.kernels`), whose order is one by
  construction.
- A product that is added to another is rounded first: a fused multiply-add rounds once, and whether
  XLA forms one depends on what it fuses.
- Functions such as exp are computed by themselves, in rows that fill whole vector registers: XLA
  has other approximations for what is left over, and other roundings where it fuses (2% of the
  values of `exp(x - max)` differ from those of exp of the difference).
- Reductions are the back end's `row_sums`. XLA's own order of a reduction depends on the shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32

from meshwen.ops import ordered
from meshwen.ops.backend import Backend
from meshwen.ops.numerics.base import Numerics
from meshwen.ops.ordered import added_in_trees, pad, positive_zeros, tree_sum
from meshwen.ops.weight import Weight
from meshwen.parallel.collectives import Collectives

_VECTORS = 64  # elements that fill whole vector registers


@dataclass(frozen=True)
class Exact(Numerics):
    """The same bits on every mesh.

    Attributes:
        vocabulary_leaves: slices of the vocabulary on each device.
    """

    vocabulary_leaves: int = 32

    ordered: ClassVar[bool] = True
    version: ClassVar[int] = 2  # Raised by every change that moves a bit.

    def matmul_leaves(
        self, x: Float[Array, "M in"], weight: Weight, backend: Backend
    ) -> Float32[Array, "M out"]:
        """`x @ weight`, the leaves' results added in a tree."""
        leaves = weight.leaves

        def added(rows: Array) -> Array:
            parts = jnp.split(rows, len(leaves), axis=1)
            pairs = zip(parts, leaves, strict=True)
            sums = [backend.matmul(part, leaf, ordered=True) for part, leaf in pairs]
            return added_in_trees(sums, weight.tree)

        partials = len(leaves) * weight.outputs
        return ordered.by_blocks(added, x, partials, backend.block_rows(leaves[0].dtype))

    def all_reduce(
        self, x: Float32[Array, "M D"], collectives: Collectives
    ) -> Float32[Array, "M D"]:
        """The tree's top: a subtree's sum on every device -> the sum of all, on every device."""
        if not collectives.axes:
            return positive_zeros(x)
        n = collectives.devices
        padded = pad(x, 1, -x.shape[1] % n).reshape(x.shape[0], n, -1)
        shares = collectives.all_to_all(padded)
        share = tree_sum(shares.reshape(n, x.shape[0], -1), axis=0)
        return collectives.all_gather(share, axis=1)[:, : x.shape[1]]

    def select(
        self, x: Float32[Array, "*shape"], collectives: Collectives
    ) -> Float32[Array, "*shape"]:
        """An all-reduce of the bits."""
        return _bits_added(x, collectives) if collectives.axes else x

    def largest(self, x: Float32[Array, " B"], collectives: Collectives) -> Float32[Array, " B"]:
        """The largest of what is gathered."""
        return collectives.stack(x).max(axis=0) if collectives.axes else x

    def vocabulary_sum(
        self, x: Float32[Array, "B V"], backend: Backend, collectives: Collectives
    ) -> Float32[Array, " B"]:
        """The sums of the slices, added in a tree."""
        slices = x.reshape(x.shape[0] * self.vocabulary_leaves, -1)
        sums = backend.row_sums(slices).reshape(x.shape[0], self.vocabulary_leaves)
        total = tree_sum(sums, axis=1)
        return tree_sum(collectives.stack(total), axis=0) if collectives.axes else total

    def mean(self, x: Float32[Array, "*rows D"], backend: Backend) -> Float32[Array, "*rows 1"]:
        """A sum in one order, divided."""
        sums = backend.row_sums(x.reshape(-1, x.shape[-1])).reshape(x.shape[:-1])
        (mean,) = self.rounded((sums[..., None] / x.shape[-1],))
        return mean

    def rounded(self, values: tuple[Array, ...]) -> tuple[Array, ...]:
        """The values, each rounded to its dtype by itself."""
        return lax.optimization_barrier(values)

    def pointwise(
        self, function: Callable[[Array], Array], x: Float32[Array, "*shape"]
    ) -> Float32[Array, "*shape"]:
        """The function by itself, in rows of one width."""
        rows = pad(x.reshape(-1), 0, -x.size % _VECTORS).reshape(-1, _VECTORS)
        (rows,) = lax.optimization_barrier((rows,))
        (y,) = lax.optimization_barrier((function(rows),))
        return y.reshape(-1)[: x.size].reshape(x.shape)

    def inverse_sqrt(self, x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Square root and division, each of which IEEE 754 rounds in one way.

        The barrier keeps XLA from making `rsqrt` of the two, which every processor approximates.
        """
        return self.pointwise(lambda x: 1 / lax.optimization_barrier(jnp.sqrt(x)), x)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _bits_added(x: Float32[Array, "*shape"], collectives: Collectives) -> Float32[Array, "*shape"]:
    """The sum over the devices, all but one of which have zeros. Bits have no derivative."""
    bits = collectives.all_reduce(lax.bitcast_convert_type(x, jnp.int32))
    return lax.bitcast_convert_type(bits, jnp.float32)


@_bits_added.defjvp
def _bits_added_jvp(
    collectives: Collectives, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    """The derivative of a sum."""
    return _bits_added(*primals, collectives), collectives.all_reduce(*tangents)
