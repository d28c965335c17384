# SPDX-License-Identifier: Apache-2.0
"""Weights as the kernels read them: from one end to the other.

A weight [in, out] is cut into panels of 32 columns. A step of a panel is 4 bytes of each column:
one float32, two bfloat16 or four int8 that stand below each other, as instructions take them.
Rows of a plain matrix are pieces of memory far from one another, which processors fetch half as
fast: one row times [4864, 896] bfloat16 took 0.89 ms by rows and 0.36 by panels (Zen 3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from meshwen.common.choices import Quantization
from meshwen.ops.quant.int8 import GROUP, dequantized, quantized

COLUMNS = 32  # of a panel
STEP = 4  # bytes of a column


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales"),
    meta_fields=("shape", "dtype"),
)
@dataclass(frozen=True)
class PackedWeight:
    """A weight [in, out], on one device or, the parts one behind the other, on several.

    Each device's part is padded with zeros to whole panels and steps, in int8 to whole groups.

    Attributes:
        values: float32 [out/32, in, 32, 1], bfloat16 [out/32, in/2, 32, 2] or int8
            [out/32, in/4, 32, 4]: panel, step, column, number of a step.
        scales: bfloat16 [out/32, in/32, 32] of int8; else None.
        shape: (in, out) of a device's part, without padding.
        dtype: of the weight; of int8, of what the model multiplies without it.
    """

    values: Array
    scales: Array | None
    shape: tuple[int, int]
    dtype: jnp.dtype

    @classmethod
    def of(
        cls, weight: Array, dtype: jnp.dtype, quantization: Quantization | None = None
    ) -> PackedWeight:
        """Packs one device's part [out, in], as in a checkpoint, rounded to `dtype`."""
        outputs, inputs = weight.shape
        return cls(*packed(weight, dtype, quantization), (inputs, outputs), jnp.dtype(dtype))


# A matrix [in, out].
AnyWeight = Array | PackedWeight


def packed(
    weight: Array, dtype: jnp.dtype, quantization: Quantization | None = None
) -> tuple[Array, Array | None]:
    """The values and scales of one device's part: see `PackedWeight`.

    Args:
        weight: [out, in], as in a checkpoint, of any floating-point dtype.
        dtype: float32 or bfloat16.
        quantization: see `meshwen.ops.quant.int8`.
    """
    weight = jnp.pad(weight, ((0, -weight.shape[0] % COLUMNS), (0, 0)))
    if quantization is None:
        return _panels(weight.astype(dtype)), None
    values, scales = quantized(weight)
    outputs, groups = scales.shape
    return _panels(values), scales.reshape(outputs // COLUMNS, COLUMNS, groups).swapaxes(1, 2)


def unpacked(weight: PackedWeight) -> Array:
    """The weight, or what int8 stands for: [in, out] in its dtype."""
    values, scales = _rows(weight.values), weight.scales
    if scales is not None:
        values = dequantized(values, scales.swapaxes(1, 2).reshape(len(values), -1))
    return values.astype(weight.dtype)[: weight.shape[1], : weight.shape[0]].T


def unpacked_for(x: Array, weight: PackedWeight) -> tuple[Array, Array]:
    """x, which is about to be multiplied with a weight, and `unpacked` of it.

    The barrier keeps a compiler from making all of a model's weights before any is needed.
    """
    values, scales, x = jax.lax.optimization_barrier((weight.values, weight.scales, x))
    return x, unpacked(replace(weight, values=values, scales=scales))


def column(weight: PackedWeight, index: Array) -> Array:
    """Columns of one device's part, of a weight without scales: int [...] -> [..., in]."""
    found = weight.values[index // COLUMNS, :, index % COLUMNS]
    return found.reshape(*index.shape, -1)[..., : weight.shape[0]]


def packed_bytes(
    shape: tuple[int, ...], dtype: jnp.dtype, quantization: Quantization | None
) -> int:
    """Bytes of values and scales of a device's part [out, in]."""
    outputs, inputs = shape
    columns = -(-outputs // COLUMNS) * COLUMNS
    if quantization:
        return columns * -(-inputs // GROUP) * (GROUP + 2)
    return columns * -(-inputs * dtype.itemsize // STEP) * STEP


def _panels(values: Array) -> Array:
    """[out, in] -> [out/32, steps, 32, numbers of a step]."""
    depth = STEP // values.dtype.itemsize
    whole = jnp.pad(values, ((0, 0), (0, -values.shape[1] % depth)))
    panels, steps = whole.shape[0] // COLUMNS, whole.shape[1] // depth
    return whole.reshape(panels, COLUMNS, steps, depth).swapaxes(1, 2)


def _rows(values: Array) -> Array:
    """[out/32, steps, 32, numbers of a step] -> [out, in]."""
    panels, steps, columns, depth = values.shape
    return values.swapaxes(1, 2).reshape(panels * columns, steps * depth)
