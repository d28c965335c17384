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
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

Quantization = Literal["int8"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

GROUP = 32  # numbers that share a scale
DEPTH = 4  # of them lie next to one another, as instructions take them
COLUMNS = 32  # of a panel, which is read from one end to the other


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales"),
    meta_fields=("shape", "dtype"),
)
@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [in, out] in int8, on one device or, the parts one behind the other, on several.

    Each device's part is padded with zeros to whole groups and panels of columns.

    Attributes:
        values: int8 [out/32, in/32, 8, 32, 4]: panel, group, step, column, number of a step.
        scales: bfloat16 [out/32, in/32, 32].
        shape: (in, out) of a device's part, without padding.
        dtype: of what the model multiplies without int8.
    """

    values: Array
    scales: Array
    shape: tuple[int, int]
    dtype: jnp.dtype


def quantized(weight: Array) -> tuple[Array, Array]:
    """The values and scales of one device's part: see `QuantizedWeight`.

    A group's scale is its largest size over 127, rounded up to bfloat16.

    Args:
        weight: [out, in], as in a checkpoint, of any floating-point dtype.
    """
    out, inputs = weight.shape
    padded = jnp.pad(weight, ((0, -out % COLUMNS), (0, -inputs % GROUP))).astype(jnp.float32)
    grouped = padded.reshape(-1, COLUMNS, padded.shape[1] // GROUP, GROUP // DEPTH, DEPTH)
    scales = _rounded_up(jnp.abs(grouped).max(axis=(3, 4)) / 127)  # [panels, 32, groups]
    divisors = jnp.where(scales == 0, 1, scales).astype(jnp.float32)[..., None, None]
    values = jnp.rint(grouped / divisors).astype(jnp.int8)
    return values.transpose(0, 2, 3, 1, 4), scales.transpose(0, 2, 1)


def dequantized_for(x: Array, weight: QuantizedWeight) -> tuple[Array, Array]:
    """x, which is about to be multiplied with a weight, and `dequantized` of it.

    The barrier keeps a compiler from making all of a model's weights before any is needed.
    """
    values, scales, x = jax.lax.optimization_barrier((weight.values, weight.scales, x))
    return x, dequantized(replace(weight, values=values, scales=scales))


def dequantized(weight: QuantizedWeight) -> Array:
    """The weight that `values` and `scales` stand for: [in, out] in its dtype."""
    panels, groups = weight.values.shape[:2]
    numbers = (
        weight.values.astype(jnp.float32) * weight.scales.astype(jnp.float32)[:, :, None, :, None]
    )
    whole = numbers.transpose(1, 2, 4, 0, 3).reshape(groups * GROUP, panels * COLUMNS)
    return whole[: weight.shape[0], : weight.shape[1]].astype(weight.dtype)


def quantized_bytes(outputs: int, inputs: int) -> int:
    """Bytes of values and scales of a device's part."""
    groups = -(-inputs // GROUP)
    panels = -(-outputs // COLUMNS)
    return panels * groups * COLUMNS * (GROUP + 2)


def _rounded_up(x: Array) -> Array:
    """float32, not negative, to the next bfloat16 that is not less."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = jnp.minimum(bits, 0x7FC00000) + 0xFFFF  # Larger ones, all NaN, would become numbers.
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
