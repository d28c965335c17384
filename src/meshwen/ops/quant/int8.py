# SPDX-License-Identifier: Apache-2.0
"""int8 weights: groups of 32 numbers along the contracted axis share a scale.

GGUF's Q8_0 has the same groups (but float16 scales; a shift makes these, bfloat16, float32). They
allow what is multiplied with the weights to be int8 too. On Qwen2.5-0.5B one scale a column and one
a token are 16 times as far from float32 (Kullback-Leibler divergence) as 32 numbers and 32 numbers:
a few activations are much larger than the others, and would make zeros of them.

A group's products are added up exactly, as integers. So where groups lie is all that a mesh could
change, and they do not cross devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from meshwen.ops.formats import Bounds, Format, Packed

GROUP = 32  # numbers that share a scale
# In either dtype: kernels round what is multiplied with weights to int8 too, so values that another
# order of a sum tips are further off than in bfloat16; and where a device's part of a weight is no
# whole number of groups, groups are others, and so are rounded weights (measured on up to 32
# devices: mean 1.4e-3 and at most 0.1 for the demo, mean 8e-4 for the 0.5B).
INT8_BOUNDS = Bounds(sampler_shortfall=5e-2, mean_kl=5e-3, max_kl=0.5)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales"),
    meta_fields=("shape", "dtype"),
)
@dataclass(frozen=True)
class Int8(Packed):
    """A weight [in, out] in int8, on one device or, the parts one behind the other, on several.

    Attributes:
        values: int8 [out, in padded to groups].
        scales: bfloat16 [out, groups].
    """

    values: Array
    scales: Array
    shape: tuple[int, int]
    dtype: jnp.dtype

    @property
    def format(self) -> Format:
        """What packs it."""
        return INT8

    def unpacked(self) -> Array:
        """The numbers that it stands for: [in, out] in its dtype."""
        return dequantized(self.values, self.scales).astype(self.dtype)[:, : self.shape[0]].T

    def repackable(self) -> Array:
        """float32 [out, in] that `quantized` makes the same values and scales of."""
        return requantizable(self.values, self.scales)[:, : self.shape[0]]

    def times(self, factors: Array) -> Int8:
        """The values times -1, 0 or 1, with the scales that they have: see `Packed.times`."""
        return replace(self, values=self.values * whole_groups(factors.T).astype(jnp.int8))


@dataclass(frozen=True)
class Int8Format(Format):
    """int8 with scales, row by row."""

    name = "int8"
    outputs = 1
    bounds = INT8_BOUNDS

    def pack(self, part: Array, dtype: jnp.dtype) -> Int8:
        """Quantises one device's part [out, in]."""
        return Int8(*quantized(part), (part.shape[1], part.shape[0]), jnp.dtype(dtype))

    def wrap(self, arrays: list[Array], shape: tuple[int, int], dtype: jnp.dtype) -> Int8:
        """A weight of values and scales."""
        values, scales = arrays
        return Int8(values, scales, shape, dtype)

    def nbytes(self, shape: tuple[int, int], dtype: jnp.dtype) -> int:
        """Bytes of values and scales of a device's part [out, in]."""
        outputs, inputs = shape
        return outputs * -(-inputs // GROUP) * (GROUP + 2)


INT8 = Int8Format()


def quantized(weight: Array) -> tuple[Array, Array]:
    """The values and scales of a weight.

    A group's scale is its largest size over 127, rounded up to bfloat16.

    Args:
        weight: [out, in], as in a checkpoint, of any floating-point dtype.

    Returns:
        int8 [out, in padded to groups], bfloat16 [out, groups].
    """
    out = len(weight)
    padded = whole_groups(weight).astype(jnp.float32)
    grouped = padded.reshape(out, padded.shape[1] // GROUP, GROUP)
    scales = _rounded_up(jnp.abs(grouped).max(axis=2) / 127)
    divisors = jnp.where(scales == 0, 1, scales).astype(jnp.float32)[..., None]
    return jnp.rint(grouped / divisors).astype(jnp.int8).reshape(padded.shape), scales


def whole_groups(weight: Array) -> Array:
    """[out, in] with zeros behind each row, to whole groups."""
    return jnp.pad(weight, ((0, 0), (0, -weight.shape[1] % GROUP)))


def dequantized(values: Array, scales: Array) -> Array:
    """The numbers that `quantized` stands for: float32 [out, in]."""
    grouped = values.reshape(*scales.shape, GROUP).astype(jnp.float32)
    return (grouped * scales.astype(jnp.float32)[..., None]).reshape(values.shape)


def requantizable(values: Array, scales: Array) -> Array:
    """Numbers that `quantized` makes these values and scales of: float32 [out, in].

    What they stand for. But where a group's largest size is 126, not 127, 126 times the scale would
    be given a smaller scale: there it is half way between the least that keeps the scale, which is
    127 times the next smaller one, and 126.5, which is the most that is rounded to 126.
    """
    grouped, factors = values.reshape(*scales.shape, GROUP), scales[..., None]
    sizes = jnp.abs(grouped)
    smaller = jax.lax.bitcast_convert_type(factors, jnp.uint16) - 1
    smaller = jax.lax.bitcast_convert_type(smaller, jnp.bfloat16).astype(jnp.float32)
    factors = factors.astype(jnp.float32)
    kept = jnp.sign(grouped) * (127 * smaller + 126.5 * factors) / 2
    short = (sizes == 126) & (sizes.max(axis=2, keepdims=True) == 126)
    return jnp.where(short, kept, grouped * factors).reshape(values.shape)


def _rounded_up(x: Array) -> Array:
    """float32, not negative, to the next bfloat16 that is not less."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = jnp.minimum(bits, 0x7FC00000) + 0xFFFF  # Larger ones, all NaN, would become numbers.
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
