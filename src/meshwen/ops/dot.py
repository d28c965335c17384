# SPDX-License-Identifier: Apache-2.0
"""The matmul that everything is made of."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def dot(a: Array, b: Array, dimension_numbers: lax.DotDimensionNumbers) -> Array:
    """`lax.dot_general` with float32 accumulation and output, and no hidden loss of precision.

    float32 inputs are multiplied as float32: without `HIGHEST`, TPUs would round them to bfloat16
    and recent GPUs to TensorFloat-32.
    """
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, dimension_numbers, precision=precision, preferred_element_type=jnp.float32
    )


def batched(a: Array, b: Array) -> Array:
    """a @ b of matrices: [..., M, c] x [..., c, N] -> float32 [..., M, N]."""
    batch = tuple(range(a.ndim - 2))
    return dot(a, b, (((a.ndim - 1,), (b.ndim - 2,)), (batch, batch)))
