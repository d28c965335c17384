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

import jax
import jax.numpy as jnp
from jax import Array

GROUP = 32  # numbers that share a scale


def quantized(weight: Array) -> tuple[Array, Array]:
    """The values and scales of a weight.

    A group's scale is its largest size over 127, rounded up to bfloat16.

    Args:
        weight: [out, in], as in a checkpoint, of any floating-point dtype.

    Returns:
        int8 [out, in padded to groups], bfloat16 [out, groups].
    """
    out, inputs = weight.shape
    padded = jnp.pad(weight, ((0, 0), (0, -inputs % GROUP))).astype(jnp.float32)
    grouped = padded.reshape(out, padded.shape[1] // GROUP, GROUP)
    scales = _rounded_up(jnp.abs(grouped).max(axis=2) / 127)
    divisors = jnp.where(scales == 0, 1, scales).astype(jnp.float32)[..., None]
    return jnp.rint(grouped / divisors).astype(jnp.int8).reshape(padded.shape), scales


def dequantized(values: Array, scales: Array) -> Array:
    """The numbers that `quantized` stands for: float32 [out, in]."""
    grouped = values.reshape(*scales.shape, GROUP).astype(jnp.float32)
    return (grouped * scales.astype(jnp.float32)[..., None]).reshape(values.shape)


def _rounded_up(x: Array) -> Array:
    """float32, not negative, to the next bfloat16 that is not less."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = jnp.minimum(bits, 0x7FC00000) + 0xFFFF  # Larger ones, all NaN, would become numbers.
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
