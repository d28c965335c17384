# SPDX-License-Identifier: Apache-2.0
"""The key/value cache: one row a sequence, positions from the left, a device's own heads only."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from meshwen.parallel.plan import ParallelPlan

# Heads before positions: attention's products then have their batch dimensions first, and XLA need
# not re-lay the cache out at each step.
_AXES = ("batch", "heads", "length", "head_dim")


class LayerCache(NamedTuple):
    """Keys and values of one layer, each [B, K, S, H]; position p of a sequence is at slot p."""

    keys: Array
    values: Array

    def write(self, keys: Array, values: Array, start: Array) -> LayerCache:
        """The cache with new keys and values [B, K, T, H] at slots start[b] ... start[b] + T - 1.

        The caller keeps start + T within the S slots: beyond, XLA would shift the update to fit.
        """
        put = jax.vmap(lambda cache, new, at: lax.dynamic_update_slice(cache, new, (0, at, 0)))
        return LayerCache(
            put(self.keys, keys.astype(self.keys.dtype), start),
            put(self.values, values.astype(self.values.dtype), start),
        )


KVCache = tuple[LayerCache, ...]


def cache_sharding(plan: ParallelPlan) -> NamedSharding:
    """The sharding of every array of the cache."""
    return plan.sharding(*_AXES)


def cache_shape(plan: ParallelPlan, batch: int, length: int) -> tuple[int, int, int, int]:
    """Shape of one layer's keys (and values) over all devices: [B, n * K, S, H]."""
    heads = plan.model_devices * plan.heads.local_key_value_heads
    return (batch, heads, length, plan.config.head_dim)


def empty_cache(plan: ParallelPlan, batch: int, length: int, dtype: jnp.dtype) -> KVCache:
    """A cache of `length` slots for `batch` sequences, made shard by shard on the devices."""
    shape, sharding = cache_shape(plan, batch, length), cache_sharding(plan)
    layers = plan.config.num_hidden_layers

    def zeros() -> KVCache:
        return tuple(
            LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers)
        )

    return jax.jit(zeros, out_shardings=sharding)()


def cache_bytes_per_token(plan: ParallelPlan, dtype: jnp.dtype) -> int:
    """Bytes of cache that one token takes on each device."""
    heads, head_dim = plan.heads.local_key_value_heads, plan.config.head_dim
    return 2 * plan.config.num_hidden_layers * heads * head_dim * jnp.dtype(dtype).itemsize
