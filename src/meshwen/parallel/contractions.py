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

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax

from meshwen.parallel.plan import ParallelPlan

# XLA's CPU back end takes 8 times as long for a bfloat16 product of one row as for one of eight
# rows (all layers of Qwen2.5-0.5B: 485 against 59 ms with jax 0.10, 831 against 60 with 0.12).
_CPU_BFLOAT16_ROWS = 8


@dataclass(frozen=True)
class TensorParallel:
    """Contractions over the mesh axes `axes`; with () they are those of one device.

    Attributes:
        axes: mesh axes that split the model.
        min_rows: products of fewer rows are padded to this many.
    """

    axes: tuple[str, ...] = ()
    min_rows: int = 1

    @classmethod
    def of(cls, plan: ParallelPlan, dtype: jnp.dtype) -> TensorParallel:
        """The contractions for a plan, with weights of `dtype`."""
        on_cpu = plan.mesh.devices.flat[0].platform == "cpu"
        rows = _CPU_BFLOAT16_ROWS if on_cpu and dtype == jnp.bfloat16 else 1
        return cls(plan.model_axes, rows)

    def column(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        """`x @ weight + bias`, output split: [..., in] x [in, out/n] -> float32 [..., out/n]."""
        y = self._product(x, weight, contract=0)
        return y if bias is None else y + bias.astype(jnp.float32)

    def row(self, x: Array, weight: Array) -> Array:
        """`x @ weight`, all-reduced; input split: [..., in/n] x [in/n, out] -> f32 [..., out]."""
        return self.all_reduce(self._product(x, weight, contract=0))

    def embed(self, token_ids: Array, table: Array) -> Array:
        """Rows of a table split by rows: int [...] x [V/n, D] -> float32 [..., D], all-reduced."""
        row = token_ids - self.index() * table.shape[0]
        here = (row >= 0) & (row < table.shape[0])
        rows = jnp.take(table, jnp.where(here, row, 0), axis=0).astype(jnp.float32)
        return self.all_reduce(jnp.where(here[..., None], rows, 0))

    def tied_logits(self, x: Array, table: Array) -> Array:
        """Logits from the embedding table: [..., D] x [V/n, D] -> float32 [..., V/n], split."""
        return self._product(x, table, contract=1)

    def all_reduce(self, x: Array) -> Array:
        """The sum of `x` over the devices that split the model."""
        return lax.psum(x, self.axes) if self.axes else x

    def index(self) -> Array | int:
        """This device's number among those that split the model, row-major."""
        return lax.axis_index(self.axes) if self.axes else 0

    def _product(self, x: Array, weight: Array, contract: int) -> Array:
        """[..., c] times a weight whose axis `contract` is c, as one two-dimensional product."""
        rows = x.reshape(-1, x.shape[-1]).astype(weight.dtype)
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
