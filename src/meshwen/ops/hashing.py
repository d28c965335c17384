# SPDX-License-Identifier: Apache-2.0
"""A hash of 32-bit integers."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def mixed(bits: Array) -> Array:
    """MurmurHash3's finaliser of uint32: every bit moves about half of the result's bits."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
