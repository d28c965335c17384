# SPDX-License-Identifier: Apache-2.0
"""The key/value cache: one row a sequence, positions from the left, a device's own heads only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from meshwen.models.config import ModelConfig
from meshwen.parallel.plan import ParallelPlan
from meshwen.runtime.jax_settings import Program


class LayerCache(NamedTuple):
    """Keys and values of one layer; position p of a sequence is at slot p.

    Heads stand before positions, so that attention's products have their batch dimensions first and
    XLA need not re-lay the cache out at each step. Keys are kept transposed: XLA's CPU back end
    reads them three times as fast that way (jax 0.10).

    Keys are float32 whatever the weights are. Qwen2.5's key biases are so large (up to 211 in the
    0.5B) that rounding keys to bfloat16 moves attention scores by whole units: with bfloat16
    weights the mean KL divergence from float32 is 20 to 1000 times larger on chat prompts then.
    """

    keys: Array  # float32 [B, K, H, S]
    values: Array  # [B, K, S, H]

    def written(self, keys: Array, values: Array, start: Array) -> LayerCache:
        """With new keys [B, K, H, T] and values [B, K, T, H].

        Row b's are written at slots start[b] ... start[b] + T - 1. The caller keeps these within
        the S slots: beyond, XLA would shift the update to fit.
        """
        return LayerCache(
            _write(self.keys, keys, start, axis=2), _write(self.values, values, start, axis=1)
        )

    def read(self, slots: int) -> tuple[Array, Array]:
        """The first slots: keys [B, K, H, slots], values [B, K, slots, H]."""
        return self.keys[..., :slots], self.values[:, :, :slots]

    def located(self) -> tuple[Array, Array, Array]:
        """Keys, values, and the rows of these that sequences have: int32 [B]."""
        return self.keys, self.values, jnp.arange(self.keys.shape[0])


class SequenceCache(NamedTuple):
    """One row of a layer's cache, into which a chunk of a prompt is read.

    A chunk is written to the layer's arrays themselves: taking the row out and putting it back
    makes XLA copy all of them.
    """

    layer: LayerCache
    row: Array  # int32 []
    reads: Array | None  # bool []: where it is false, nothing is written; None: true

    def written(self, keys: Array, values: Array, start: Array) -> SequenceCache:
        """With new keys [1, K, H, T] and values [1, K, T, H], at slots start[0] and following."""
        layer = LayerCache(
            self._put(self.layer.keys, keys, start[0], axis=3),
            self._put(self.layer.values, values, start[0], axis=2),
        )
        return self._replace(layer=layer)

    def read(self, slots: int) -> tuple[Array, Array]:
        """The row's first slots: keys [1, K, H, slots], values [1, K, slots, H]."""
        keys, values = (lax.dynamic_slice_in_dim(array, self.row, 1) for array in self.layer)
        return keys[..., :slots], values[:, :, :slots]

    def located(self) -> tuple[Array, Array, Array]:
        """Keys and values of all rows, and the row: int32 [1]."""
        return *self.layer, self.row[None]

    def _put(self, cache: Array, new: Array, start: Array, axis: int) -> Array:
        at = [jnp.int32(0)] * cache.ndim
        at[0], at[axis] = self.row, start
        new = new.astype(cache.dtype)

        def in_place(cache: Array, new: Array) -> Array:
            if self.reads is not None:
                new = jnp.where(self.reads, new, lax.dynamic_slice(cache, at, new.shape))
            return lax.dynamic_update_slice(cache, new, at)

        if cache.dtype != jnp.bfloat16:
            return in_place(cache, new)
        on_cpu = partial(_as_integers, in_place)
        return lax.platform_dependent(cache, new, cpu=on_cpu, default=in_place)


def _write(cache: Array, new: Array, start: Array, axis: int) -> Array:
    """Writes `new` at `start[b]` of each row's `axis`, counted without the batch axis."""
    new = new.astype(cache.dtype)
    in_place = partial(_write_in_place, start=start, axis=axis)
    if cache.dtype != jnp.bfloat16:
        return in_place(cache, new)
    one = new.shape[axis + 1] == 1
    on_cpu = (
        partial(_write_by_selection, start=start, axis=axis)
        if one
        else partial(_as_integers, in_place)
    )
    return lax.platform_dependent(cache, new, cpu=on_cpu, default=in_place)


def _write_in_place(cache: Array, new: Array, *, start: Array, axis: int) -> Array:
    def put(row: Array, update: Array, at: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(row, update, at, axis)

    return jax.vmap(put)(cache, new, start)


# XLA's CPU back end (jax 0.10) writes into a bfloat16 array by converting all of it to float32 and
# back. A decode step of Qwen2.5-0.5B with 32 sequences of 1024 slots takes 510 ms that way, 368
# with integers of the same bits, and 227 when one position is written by selection over the cache.


def _as_integers(write: Callable[[Array, Array], Array], cache: Array, new: Array) -> Array:
    cache_bits, new_bits = (lax.bitcast_convert_type(a, jnp.uint16) for a in (cache, new))
    return lax.bitcast_convert_type(write(cache_bits, new_bits), cache.dtype)


def _write_by_selection(cache: Array, new: Array, *, start: Array, axis: int) -> Array:
    slots = lax.broadcasted_iota(jnp.int32, cache.shape, axis + 1)
    return jnp.where(slots == start[:, None, None, None], new, cache)


KVCache = tuple[LayerCache, ...]
AnyCache = TypeVar("AnyCache", LayerCache, SequenceCache)


def cache_sharding(plan: ParallelPlan) -> NamedSharding:
    """The sharding of every array of the cache: sequences and heads are split."""
    return plan.sharding("batch", "heads")


def empty_cache(plan: ParallelPlan, batch: int, slots: int, dtype: jnp.dtype) -> KVCache:
    """A cache of `slots` positions for `batch` sequences, its values in `dtype`, made in place."""
    heads, head_dim = plan.model_devices * plan.heads.local_key_value_heads, plan.config.head_dim

    def layer() -> LayerCache:
        return LayerCache(
            jnp.zeros((batch, heads, head_dim, slots), jnp.float32),
            jnp.zeros((batch, heads, slots, head_dim), dtype),
        )

    def layers() -> KVCache:
        return tuple(layer() for _ in range(plan.config.num_hidden_layers))

    return Program(layers, out_shardings=cache_sharding(plan))()


def resized(plan: ParallelPlan, layer: LayerCache, *, batch: int, slots: int) -> LayerCache:
    """A layer with more sequences (on each part of the batch) and slots, the new ones empty."""

    def pad(array: Array, axis: int) -> Array:
        parts, old = plan.data_devices, array.shape
        shape = (parts, batch // parts, *old[1:axis], slots, *old[axis + 1 :])
        split = array.reshape(parts, old[0] // parts, *old[1:])
        widths = [(0, new - now) for new, now in zip(shape, split.shape, strict=True)]
        return jnp.pad(split, widths).reshape(batch, *shape[2:])

    return LayerCache(pad(layer.keys, axis=3), pad(layer.values, axis=2))


def without_row(cache: KVCache, row: Array) -> KVCache:
    """The cache with zeros in a row: what is masked has weight 0, but 0 times NaN is NaN."""
    return jax.tree.map(lambda array: array.at[row].set(0), cache)


def cache_bytes_per_token(config: ModelConfig, heads: int, dtype: jnp.dtype) -> int:
    """Bytes of cache that one token takes for `heads` key/value heads, with values in `dtype`."""
    key_and_value = jnp.dtype(jnp.float32).itemsize + jnp.dtype(dtype).itemsize
    return config.num_hidden_layers * heads * config.head_dim * key_and_value
