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
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from meshwen.ops.formats import Bounds, Format, Packed
from meshwen.ops.quant.int8 import (
    GROUP,
    INT8_BOUNDS,
    dequantized,
    quantized,
    requantizable,
    whole_groups,
)

COLUMNS = 32  # of a panel
STEP = 4  # bytes of a column


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales"),
    meta_fields=("shape", "dtype"),
)
@dataclass(frozen=True)
class Panels(Packed):
    """A weight [in, out] in panels, on one device or, the parts one behind the other, on several.

    Each device's part is padded with zeros to whole panels and steps, in int8 to whole groups.

    Attributes:
        values: float32 [out/32, in, 32, 1], bfloat16 [out/32, in/2, 32, 2] or int8
            [out/32, in/4, 32, 4]: panel, step, column, number of a step.
        scales: bfloat16 [out/32, in/32, 32] of int8; else None.
    """

    values: Array
    scales: Array | None
    shape: tuple[int, int]
    dtype: jnp.dtype

    @property
    def format(self) -> Format:
        """What packs it."""
        return PANELS if self.scales is None else INT8_PANELS

    def unpacked(self) -> Array:
        """The weight, or what int8 stands for: [in, out] in its dtype."""
        values, scales = self._rows()
        if scales is not None:
            values = dequantized(values, scales)
        return values.astype(self.dtype)[: self.shape[1], : self.shape[0]].T

    def repackable(self) -> Array:
        """[out, in] that `pack` makes the same panels of."""
        values, scales = self._rows()
        if scales is not None:
            values = requantizable(values, scales)
        return values[: self.shape[1], : self.shape[0]]

    def _rows(self) -> tuple[Array, Array | None]:
        """Values [out, in] and scales [out, groups], with their padding."""
        values = _rows(self.values)
        if self.scales is None:
            return values, None
        return values, self.scales.swapaxes(1, 2).reshape(len(values), -1)

    def times(self, factors: Array) -> Panels:
        """The values times -1, 0 or 1, with the scales that they have: see `Packed.times`."""
        rows = _whole(factors.T).astype(self.values.dtype)
        rows = rows if self.scales is None else whole_groups(rows)
        return replace(self, values=self.values * _panels(rows))

    def columns(self, index: Array) -> Array:
        """Columns of one device's part, without scales: int [...] -> [..., in]."""
        if self.scales is not None:
            return super().columns(index)
        found = self.values[index // COLUMNS, :, index % COLUMNS]
        return found.reshape(*index.shape, -1)[..., : self.shape[0]]


@dataclass(frozen=True)
class PanelsFormat(Format):
    """Panels of float32 or bfloat16."""

    name = "panels"
    outputs = COLUMNS
    bounds: ClassVar[Bounds | None] = None

    def pack(self, part: Array, dtype: jnp.dtype) -> Panels:
        """Packs one device's part [out, in], rounded to `dtype`."""
        values = _panels(_whole(part).astype(dtype))
        return Panels(values, None, (part.shape[1], part.shape[0]), jnp.dtype(dtype))

    def wrap(self, arrays: list[Array], shape: tuple[int, int], dtype: jnp.dtype) -> Panels:
        """Panels of their arrays."""
        values, *scales = arrays
        return Panels(values, scales[0] if scales else None, shape, dtype)

    def nbytes(self, shape: tuple[int, int], dtype: jnp.dtype) -> int:
        """Bytes of a device's part [out, in]."""
        outputs, inputs = shape
        return -(-outputs // COLUMNS) * COLUMNS * -(-inputs * dtype.itemsize // STEP) * STEP


@dataclass(frozen=True)
class Int8PanelsFormat(PanelsFormat):
    """Panels of int8, and of their scales: see `meshwen.ops.quant.int8`."""

    name = "int8 panels"
    bounds = INT8_BOUNDS

    def pack(self, part: Array, dtype: jnp.dtype) -> Panels:
        """Packs one device's part [out, in], quantised."""
        values, scales = quantized(_whole(part))
        outputs, groups = scales.shape
        scales = scales.reshape(outputs // COLUMNS, COLUMNS, groups).swapaxes(1, 2)
        return Panels(_panels(values), scales, (part.shape[1], part.shape[0]), jnp.dtype(dtype))

    def nbytes(self, shape: tuple[int, int], dtype: jnp.dtype) -> int:
        """Bytes of values and scales of a device's part [out, in]."""
        outputs, inputs = shape
        return -(-outputs // COLUMNS) * COLUMNS * -(-inputs // GROUP) * (GROUP + 2)


PANELS, INT8_PANELS = PanelsFormat(), Int8PanelsFormat()


def _whole(part: Array) -> Array:
    """[out, in] with zeros behind, to whole panels."""
    return jnp.pad(part, ((0, -part.shape[0] % COLUMNS), (0, 0)))


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
