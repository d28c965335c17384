# SPDX-License-Identifier: Apache-2.0
"""The three contractions through which tensor parallelism enters the model.

Megatron-LM's scheme (arXiv 1909.08053), as code that runs on every device under `shard_map` and
sees its own part of each weight:

- column-parallel: the output is split, nothing is communicated;
- row-parallel: the input is split, partial sums are added by one all-reduce;
- vocabulary-parallel: the table's rows are split; a lookup finds a row on one device and zeros on
  the others, added by one all-reduce; logits stay split.

Products take their inputs in the weights' dtype and accumulate and return float32; so partial sums
are also reduced in float32, and bfloat16 costs no more accuracy on many devices than on one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from meshwen.ops.cpu import kernels
from meshwen.ops.cpu.packing import AnyWeight, PackedWeight, column, unpacked_for

# For the CPU: jax 0.10 takes optimization barriers out before it fuses; later versions afterwards.
COMPILER_OPTIONS: dict[str, str | bool] = {"xla_disable_hlo_passes": "cse_barrier_expander"}


@dataclass(frozen=True)
class TensorParallel:
    """Contractions over the mesh axes `axes`; with () they are those of one device.

    Attributes:
        axes: mesh axes that split the model.
        min_rows: products of fewer rows are padded to this many.
        kernels: whether `meshwen.ops.cpu.kernels` multiplies with weights, in the place of XLA, and
            `attention` takes the place of `scores` and `weighted_values`.
        alone: whether each device does so by one thread, as there are no more threads than devices.
    """

    axes: tuple[str, ...] = ()
    min_rows: int = 1
    kernels: bool = False
    alone: bool = False

    @property
    def devices(self) -> int:
        """Devices that split the model."""
        return lax.axis_size(self.axes) if self.axes else 1

    def column(self, x: Array, weight: AnyWeight, bias: Array | None = None) -> Array:
        """`x @ weight + bias`, output split: [..., in] x [in, out/n] -> float32 [..., out/n]."""
        y = self._product(x, weight, contract=0)
        return y if bias is None else y + bias.astype(jnp.float32)

    def row(self, x: Array, weight: Any) -> Array:
        """`x @ weight`, all-reduced; input split: [..., in/n] x [in/n, out] -> f32 [..., out]."""
        return self.all_reduce(self._product(x, weight, contract=0))

    def embed(self, token_ids: Array, table: AnyWeight) -> Array:
        """Rows of a table split by rows: int [...] x [V/n, D] -> float32 [..., D], all-reduced.

        A packed table is [D, V/n].
        """
        count = table.shape[1] if isinstance(table, PackedWeight) else table.shape[0]
        row = token_ids - self.index() * count
        here = (row >= 0) & (row < count)
        row = jnp.where(here, row, 0)
        if isinstance(table, PackedWeight):
            rows = column(table, row)
        else:
            rows = jnp.take(table, row, axis=0)
        return self.only(jnp.where(here[..., None], rows.astype(jnp.float32), 0))

    def tied_logits(self, x: Array, table: AnyWeight) -> Array:
        """Logits from the embedding table: [..., D] x [V/n, D] -> float32 [..., V/n], split.

        A packed table is [D, V/n].
        """
        if isinstance(table, PackedWeight):
            return self.column(x, table)
        return self._product(x, table, contract=1)

    def mean_square(self, x: Array) -> Array:
        """Mean of squares over the last axis: float32 [..., D] -> float32 [..., 1]."""
        return jnp.square(x).mean(axis=-1, keepdims=True)

    def scores(self, q: Array, k: Array) -> Array:
        """q k^T: float32 [B, K, R, H] x [B, K, H, S] -> float32 [B, K, R, S]."""
        return product(q, k, (((3,), (2,)), ((0, 1), (0, 1))))

    def weighted_values(self, weights: Array, v: Array) -> tuple[Array, Array]:
        """Values summed with weights, and the weights summed.

        Args:
            weights: float32 [B, K, R, S].
            v: [B, K, S, H].

        Returns:
            float32 [B, K, R, H], float32 [B, K, R, 1].
        """
        total = weights.sum(axis=-1, keepdims=True)
        return product(weights.astype(v.dtype), v, (((3,), (2,)), ((0, 1), (0, 1)))), total

    def attention(
        self, q: Array, keys: Array, values: Array, rows: Array, starts: Array, window: Array
    ) -> Array:
        """Attention of tokens that follow one another: see `kernels.attention`."""
        return kernels.attention(q, keys, values, rows, starts, window, self.alone)

    def rounded(self, products: tuple[Array, ...]) -> tuple[Array, ...]:
        """Products that are about to be added up.

        A compiler may round a product and its sum at once, here and not there.
        """
        return products

    def pointwise(self, function: Callable[[Array], Array], x: Array) -> Array:
        """A function of each element, such as exp.

        A compiler may approximate it in several ways, here in one and there in another.
        """
        return function(x)

    def all_reduce(self, x: Array) -> Array:
        """The sum of `x` over the devices that split the model."""
        return lax.psum(x, self.axes) if self.axes else x

    def only(self, x: Array) -> Array:
        """What one device has and the others have zeros for: float32, any shape."""
        return self.all_reduce(x)

    def largest(self, x: Array) -> Array:
        """The largest over the devices: float32 [B] -> float32 [B]."""
        return lax.pmax(x, self.axes) if self.axes else x

    def vocabulary_sum(self, x: Array) -> Array:
        """The sum over the vocabulary: float32 [B, V/n] -> float32 [B]."""
        # A product with ones adds 150,000 terms in many partial sums, an order more exactly than a
        # running sum does.
        ones = jnp.ones((x.shape[1], 1), jnp.float32)
        return self.all_reduce(product(x, ones, (((1,), (0,)), ((), ())))[:, 0])

    def index(self) -> Array | int:
        """This device's number among those that split the model, row-major."""
        return lax.axis_index(self.axes) if self.axes else 0

    def _product(self, x: Array, weight: AnyWeight, contract: int) -> Array:
        """[..., c] times a weight whose axis `contract` is c, as one two-dimensional product."""
        rows = x.reshape(-1, x.shape[-1])
        if isinstance(weight, PackedWeight):
            if self.kernels:
                y = kernels.product(rows, weight, self.alone)
                return y.reshape(*x.shape[:-1], weight.shape[1])
            rows, weight = unpacked_for(rows, weight)
        rows = rows.astype(weight.dtype)
        missing = max(0, self.min_rows - rows.shape[0])
        if missing:
            rows = jnp.pad(rows, ((0, missing), (0, 0)))
        y = product(rows, weight, (((1,), (contract,)), ((), ())))
        return y[: y.shape[0] - missing].reshape(*x.shape[:-1], y.shape[-1])


def product(a: Array, b: Array, dimension_numbers: lax.DotDimensionNumbers) -> Array:
    """`lax.dot_general` with float32 accumulation and output, and no hidden loss of precision.

    float32 inputs are multiplied as float32: without `HIGHEST`, TPUs would round them to bfloat16
    and recent GPUs to TensorFloat-32.
    """
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, dimension_numbers, precision=precision, preferred_element_type=jnp.float32
    )
