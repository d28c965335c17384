# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings (arXiv 2104.09864): pairs of a head's dimensions turn with the position."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32, Int

from meshwen.ops.operations import Ops


class Rotary(NamedTuple):
    """Cosines and sines of rotary angles, of half of a head's dimensions."""

    cos: Float32[Array, "*tokens 1 pairs"]
    sin: Float32[Array, "*tokens 1 pairs"]


def rotary_tables(
    positions: Int[Array, "*tokens"],
    frequencies: Float32[np.ndarray, " pairs"],
    factor: float,
    ops: Ops,
) -> Rotary:
    """Cosines and sines for tokens at some positions.

    Args:
        positions: of the tokens.
        frequencies: of the H/2 pairs of dimensions, in radians per position.
        factor: what cosines and sines are multiplied with.
        ops: the operations.
    """
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    (angles,) = ops.numerics.rounded((angles,))
    cos, sin = (ops.numerics.pointwise(f, angles) for f in (jnp.cos, jnp.sin))
    # Without the barrier XLA computes them anew in every layer, where they are used.
    return Rotary(*jax.lax.optimization_barrier((cos * factor, sin * factor)))


def rotate(
    x: Float32[Array, "*tokens N H"], rotary: Rotary, ops: Ops
) -> Float32[Array, "*tokens N H"]:
    """Turns a head's dimensions; dimension i pairs with i + H/2."""
    first, second = jnp.split(x, 2, axis=-1)
    products = first * rotary.cos, second * rotary.sin, second * rotary.cos, first * rotary.sin
    a, b, c, d = ops.numerics.rounded(products)
    return jnp.concatenate([a - b, c + d], axis=-1)
