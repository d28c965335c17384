# SPDX-License-Identifier: Apache-2.0
"""Contractions that give the same bits on every mesh, whatever else is in the batch.

Floating-point addition is not associative, so a result is a matter of the order of its additions.
Here that order is fixed by the model alone, never by the mesh, the batch or the padding:

- What is split over devices is cut into *leaves* that are the same on every mesh: the query-head
  slots, 32 slices of the MLP's inner dimension, 32 slices of the vocabulary. Leaves are added in a
  binary tree, neighbours first. A device owns an aligned run of leaves, a subtree, and adds it by
  itself. The top of the tree crosses devices: every device gets its share of the partial sums of
  all (all-to-all), adds them in tree order, and the shares are gathered. There is no
  floating-point all-reduce, whose order XLA leaves open. An addend of zero (a padded leaf) changes
  nothing, so a tree may be cut short.
- Inside a leaf the matrix product decides. Its order must depend neither on how many rows there
  are nor on how wide a device's part is. XLA's CPU back end has two libraries, measured on jax 0.10
  and 0.12 (AVX-512; AVX2 on jax 0.10):

  - YNNPACK multiplies bfloat16 in one order for any number of rows from 2 up and columns from 64
    up (from 16 for short sums), and zeros behind a sum change nothing. Operands have to lie in
    row-major order: XLA turns a transposition into another layout, which goes elsewhere. In
    float32 YNNPACK cuts the sum to suit its cache, by rows and columns.
  - Eigen adds float32 products one after the other up to 304 of them, but may share a sum among
    threads, for some shapes, where a thread's share is more than 32 (`shouldShardByInnerDim`).
    Sums of up to 64 it never shares, however many threads there are. With AVX2 it adds them up in
    other orders where rows are not 1, 4, 16 or a multiple of 24, or columns no multiple of 16.

  So float32 products are cut into sums of up to 64, padded so, handed to Eigen (YNNPACK refuses a
  transposed left operand) and added in a tree; bfloat16 products are padded to 8 rows and 64
  columns. Where there are `meshwen.ops.cpu.kernels`, all this is theirs, and softmax too: the
  order is one by construction, and exp is computed in one way.
- A product that is added to another is rounded first: a fused multiply-add rounds once, and whether
  XLA forms one depends on what it fuses.
- Functions such as exp are computed by themselves, in rows that fill whole vector registers: XLA
  has other approximations for what is left over, and other roundings where it fuses (2% of the
  values of `exp(x - max)` differ from those of exp of the difference).
- Reductions are such products with ones. XLA's own order of a reduction depends on the shape.
- -0.0 and +0.0 are equal but different bits, and a cut tree may lose the sign of a zero. So every
  product ends with +0.0 in the place of -0.0.

On other back ends the same program runs; whether its products keep their order, `verify` finds out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint

from meshwen.ops.contractions import COMPILER_OPTIONS, TensorParallel, product
from meshwen.ops.cpu import kernels
from meshwen.ops.cpu.packing import COLUMNS, AnyWeight, PackedWeight, unpacked_for

# For the CPU: only single matrix products go to YNNPACK, no reductions and nothing fused with them:
# it would take those by their size.
EXACT_COMPILER_OPTIONS: dict[str, str | bool] = COMPILER_OPTIONS | {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    "xla_cpu_enable_fast_math": False,  # Whatever the user's XLA_FLAGS say.
}

_LONGEST_SUM = 64  # products that one float32 matrix product adds up
_MIN_ROWS = 8  # of bfloat16 products: fewer are slower, and one would have another order
_MIN_COLUMNS = 64
# Of float32 products: what is left over multiples of them would have another order.
_ROWS, _COLUMNS = 24, 16
_ONES = 32  # equal columns of a sum's product with ones: one column would have another order
_VECTORS = 64  # elements that fill whole vector registers
# What partial sums may take; larger products go by blocks of rows, whose partial sums are still in
# the cache when they are added.
_PARTIAL_BYTES = 1 << 26


@dataclass(frozen=True)
class ExactTensorParallel(TensorParallel):
    """Contractions over the mesh axes `axes`, the same to the bit on every mesh.

    Attributes:
        axes: mesh axes that split the model.
        vocabulary_leaves: slices of the vocabulary on each device.
    """

    vocabulary_leaves: int = 32

    def column(self, x: Array, weight: AnyWeight, bias: Array | None = None) -> Array:
        """`x @ weight + bias`, output split: [..., in] x [in, out/n] -> float32 [..., out/n]."""
        y = self._rows(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[1])
        return y if bias is None else y + bias.astype(jnp.float32)

    def row(self, x: Array, weight: Any) -> Array:
        """`x @ weight`, summed over the devices; input split.

        Args:
            x: [..., in/n].
            weight: the leaves, each [in/n/leaves, out], in a list, or lists of lists: subtrees.

        Returns:
            float32 [..., out].
        """
        leaves, tree = jax.tree.flatten(weight, is_leaf=lambda w: isinstance(w, PackedWeight))

        def added(rows: Array) -> Array:
            parts = jnp.split(rows, len(leaves), axis=1)
            sums = [self._rows(part, leaf) for part, leaf in zip(parts, leaves, strict=True)]
            return _tree_of(jax.tree.unflatten(tree, sums))

        rows, out = x.reshape(-1, x.shape[-1]), leaves[0].shape[1]
        multiple = _ROWS if self._by_eigen(leaves[0]) else _MIN_ROWS
        total = self._across_devices(_by_blocks(added, rows, len(leaves) * out, multiple))
        return total.reshape(*x.shape[:-1], out)

    def mean_square(self, x: Array) -> Array:
        """Mean of squares over the last axis: float32 [..., D] -> float32 [..., 1]."""
        (mean,) = self.rounded((self._sums(jnp.square(x))[..., None] / x.shape[-1],))
        return mean

    def scores(self, q: Array, k: Array) -> Array:
        """q k^T: float32 [B, K, R, H] x [B, K, H, S] -> float32 [B, K, R, S]."""
        return _float32_product(q, k)

    def weighted_values(self, weights: Array, v: Array) -> tuple[Array, Array]:
        """Values summed with weights, and the weights summed.

        Zeros behind the last position that counts change nothing: bfloat16 products are added from
        the left, float32 positions are cut into sums from the left. The weights are summed by a
        product of their own: ones beside the values would have the values copied at every step.

        Args:
            weights: float32 [B, K, R, S].
            v: [B, K, S, H].

        Returns:
            float32 [B, K, R, H], float32 [B, K, R, 1].
        """
        ones = jnp.ones((weights.shape[-1], _ONES), v.dtype)
        rows = weights.reshape(-1, weights.shape[-1])
        if v.dtype == jnp.float32:
            y = _float32_product(weights, v, _LONGEST_SUM)
            total = _float32_product(rows, ones, _LONGEST_SUM)
        else:
            y = _bfloat16_product(weights.astype(v.dtype), v)
            total = _bfloat16_product(rows.astype(v.dtype), ones)
        return y, total[:, :1].reshape(*weights.shape[:-1], 1)

    def attention(
        self, q: Array, keys: Array, values: Array, rows: Array, starts: Array, window: Array
    ) -> Array:
        """Attention of tokens that follow one another: see `kernels.attention`."""
        y = kernels.attention(q, keys, values, rows, starts, window, self.alone)
        return _positive_zeros(y)

    def rounded(self, products: tuple[Array, ...]) -> tuple[Array, ...]:
        """The products, each rounded to float32 by itself."""
        return lax.optimization_barrier(products)

    def pointwise(self, function: Callable[[Array], Array], x: Array) -> Array:
        """A function of each element, by itself and in rows of one width."""
        rows = _pad(x.reshape(-1), 0, -x.size % _VECTORS).reshape(-1, _VECTORS)
        (rows,) = lax.optimization_barrier((rows,))
        (y,) = lax.optimization_barrier((function(rows),))
        return y.reshape(-1)[: x.size].reshape(x.shape)

    def only(self, x: Array) -> Array:
        """What one device has and the others have zeros for: an all-reduce of the bits."""
        if not self.axes:
            return x
        bits = lax.psum(lax.bitcast_convert_type(x, jnp.int32), self.axes)
        return lax.bitcast_convert_type(bits, jnp.float32)

    def largest(self, x: Array) -> Array:
        """The largest over the devices: float32 [B] -> float32 [B]."""
        return lax.all_gather(x, self.axes).max(axis=0) if self.axes else x

    def vocabulary_sum(self, x: Array) -> Array:
        """The sum over the vocabulary: float32 [B, V/n] -> float32 [B]."""
        leaves = x.reshape(x.shape[0], self.vocabulary_leaves, -1)
        total = _tree(self._sums(leaves), axis=1)
        return _tree(lax.all_gather(total, self.axes), axis=0) if self.axes else total

    def _rows(self, x: Array, weight: AnyWeight) -> Array:
        """x @ weight: [M, in] x [in, out] -> float32 [M, out]."""
        if isinstance(weight, PackedWeight):
            if self.kernels:
                return _positive_zeros(kernels.product(x, weight, self.alone))
            x, weight = unpacked_for(x, weight)
        if not self._by_eigen(weight):
            return _bfloat16_product(x.astype(weight.dtype), weight)
        partials = -(-x.shape[1] // _LONGEST_SUM) * weight.shape[1]
        return _by_blocks(lambda rows: _float32_product(rows, weight), x, partials, _ROWS)

    def _by_eigen(self, weight: AnyWeight) -> bool:
        return weight.dtype == jnp.float32 and not self.kernels

    def _sums(self, x: Array) -> Array:
        """The sum over the last axis: float32 [..., c] -> float32 [...]."""
        rows = x.reshape(-1, x.shape[-1])
        if self.kernels:
            ones = jnp.ones((1, x.shape[-1], COLUMNS, 1), jnp.float32)
            shape = x.shape[-1], COLUMNS
            y = kernels.product(rows, PackedWeight(ones, None, shape, ones.dtype))
        else:
            y = _float32_product(rows, jnp.ones((x.shape[-1], _ONES), jnp.float32))
        return _positive_zeros(y[:, 0]).reshape(x.shape[:-1])

    def _across_devices(self, x: Array) -> Array:
        """The tree's top: float32 [M, D], a subtree's sum on every device -> float32 [M, D]."""
        if not self.axes:
            return _positive_zeros(x)
        n = self.devices
        padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % n))).reshape(x.shape[0], n, -1)
        shares = lax.all_to_all(padded, self.axes, split_axis=1, concat_axis=0)
        share = _tree(shares.reshape(n, x.shape[0], -1), axis=0)
        return lax.all_gather(share, self.axes, axis=1, tiled=True)[:, : x.shape[1]]


def _bfloat16_product(a: Array, b: Array) -> Array:
    """a @ b: bfloat16 [..., M, c] x bfloat16 [..., c, N] -> float32 [..., M, N]."""
    (M, N), batch = (a.shape[-2], b.shape[-1]), tuple(range(a.ndim - 2))
    a = _pad(a, a.ndim - 2, max(0, _MIN_ROWS - M))
    b = _pad(b, b.ndim - 1, max(0, _MIN_COLUMNS - N))
    a, b = (with_layout_constraint(x, Layout(tuple(range(x.ndim)))) for x in (a, b))
    y = product(a, b, (((a.ndim - 1,), (b.ndim - 2,)), (batch, batch)))
    return _positive_zeros(y[..., :M, :N])


def _by_blocks(function: Callable[[Array], Array], x: Array, partials: int, multiple: int) -> Array:
    """`function(x)`, for as many rows at a time as leave their partial sums in the cache.

    Args:
        function: [M, c] -> [M, N], rows apart.
        x: [M, c].
        partials: float32 values that a row's result is the sum of.
        multiple: of how many rows blocks are.
    """
    rows, most = x.shape[0], max(multiple, _PARTIAL_BYTES // (4 * partials))
    count = -(-rows // most)
    if count == 1:
        return function(x)
    block = -(-rows // (count * multiple)) * multiple
    blocks = _pad(x, 0, count * block - rows).reshape(count, block, x.shape[1])
    y = lax.map(function, blocks)
    return y.reshape(count * block, -1)[:rows]


def _float32_product(a: Array, b: Array, length: int = 0) -> Array:
    """a @ b: float32 [..., M, c] x float32 [..., c, N] -> float32 [..., M, N].

    Cut into sums of `length` from the left; 0: of one length that divides c.
    """
    (M, N), batch = (a.shape[-2], b.shape[-1]), a.ndim - 2
    a = jnp.swapaxes(_pad(a, batch, _row_padding(M)), -1, -2)
    b = _pad(b, batch + 1, -N % _COLUMNS)
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
        sums.append(_transposed_product(*parts))
    if rest:
        sums.append(_transposed_product(*(o[..., None, cut:, :] for o in (a, b))))
    y = sums[0] if len(sums) == 1 else jnp.concatenate(sums, axis=batch)
    return _tree(y, axis=batch)[..., :M, :N]


def _transposed_product(a: Array, b: Array) -> Array:
    """float32 [..., c, M] x [..., c, N] -> float32 [..., M, N]."""
    batch = tuple(range(a.ndim - 2))
    contracted = (a.ndim - 2,), (a.ndim - 2,)
    return product(a, b, (contracted, (batch, batch)))


def _sum_length(length: int) -> int:
    """How many products to add up at once, so that no weight need be cut unevenly and copied.

    The most that divides `length`; but where these are few, the most.
    """
    most = min(length, _LONGEST_SUM)
    even = max(k for k in range(1, most + 1) if length % k == 0)
    return even if even >= _LONGEST_SUM // 8 else most


def _row_padding(rows: int) -> int:
    """Rows to add so that there are 1, 4, 16 or a multiple of 24: see `_ROWS`."""
    few = [count for count in (1, 4, 16) if rows <= count]
    return few[0] - rows if few else -rows % _ROWS


def _tree_of(node: Any) -> Array:
    """The sum of equal arrays in (lists of) lists, as a binary tree: neighbours first."""
    if not isinstance(node, list):
        return node
    sums = [_tree_of(child) for child in node]
    while len(sums) > 1:
        pairs = [sums[i] + sums[i + 1] for i in range(0, len(sums) - 1, 2)]
        sums = pairs + sums[2 * len(pairs) :]
    return sums[0]


def _tree(x: Array, axis: int) -> Array:
    """The sum over an axis, as a binary tree: neighbours first."""
    parts = [lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])]
    return _positive_zeros(_tree_of(parts))


def _positive_zeros(x: Array) -> Array:
    return jnp.where(x == 0, 0.0, x)


def _pad(x: Array, axis: int, count: int) -> Array:
    """Zeros behind an axis."""
    if not count:
        return x
    return jnp.pad(x, [(0, count if i == axis else 0) for i in range(x.ndim)])
