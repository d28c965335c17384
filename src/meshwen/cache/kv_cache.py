# SPDX-License-Identifier: Apache-2.0
"""The key/value cache: one row a sequence, positions from the left, a device's own heads only."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from meshwen.ops.backend import Backend
from meshwen.ops.cache_layout import CacheLayout, axes_in_order
from meshwen.parallel.plan import ParallelPlan
from meshwen.runtime.jax_settings import Jitted

_COMPUTED = "BKSH"  # the order in which a layer computes keys and values


class LayerCache(NamedTuple):
    """Keys and values of one layer, their axes in the order of the back end's `cache_layout`.

    Position p of a sequence is at index p of the axis S. Both have the dtype of the weights.
    """

    keys: Array
    values: Array

    @classmethod
    def of(cls, keys: Array, values: Array, layout: CacheLayout) -> LayerCache:
        """Of keys and values [B, K, T, H] as a layer computes them."""
        return cls(
            axes_in_order(keys, _COMPUTED, layout.keys),
            axes_in_order(values, _COMPUTED, layout.values),
        )

    def length(self, layout: CacheLayout) -> int:
        """S."""
        return self.keys.shape[layout.keys.index("S")]

    def written(self, new: LayerCache, start: Array, backend: Backend) -> LayerCache:
        """With new keys and values, row b's from position start[b] on.

        The caller keeps these within the S positions: beyond, XLA would shift the update to fit.
        """
        layout = backend.cache_layout
        return LayerCache(
            _write(self.keys, new.keys, start, layout.keys, backend),
            _write(self.values, new.values, start, layout.values, backend),
        )

    def first(self, length: int, layout: CacheLayout) -> LayerCache:
        """The first positions."""
        if length == self.length(layout):
            return self
        return LayerCache(
            lax.slice_in_dim(self.keys, 0, length, axis=layout.keys.index("S")),
            lax.slice_in_dim(self.values, 0, length, axis=layout.values.index("S")),
        )

    def located(self) -> tuple[Array, Array, Array]:
        """Keys, values, and the rows of these that sequences have: int32 [B]."""
        return self.keys, self.values, jnp.arange(self.keys.shape[0])


class SequenceCache(NamedTuple):
    """One row of a layer's cache, into which a chunk of a prompt is prefilled.

    A chunk is written to the layer's arrays themselves: taking the row out and putting it back
    makes XLA copy all of them.
    """

    layer: LayerCache
    row: Array  # int32 []
    writes: Array | None  # bool []: where it is false, nothing is written; None: true

    def length(self, layout: CacheLayout) -> int:
        """S."""
        return self.layer.length(layout)

    def written(self, new: LayerCache, start: Array, backend: Backend) -> SequenceCache:
        """With new keys and values of one sequence, from position start[0] on."""
        layout = backend.cache_layout
        layer = LayerCache(
            self._put(self.layer.keys, new.keys, start[0], layout.keys, backend),
            self._put(self.layer.values, new.values, start[0], layout.values, backend),
        )
        return self._replace(layer=layer)

    def first(self, length: int, layout: CacheLayout) -> LayerCache:
        """The row's first positions: arrays of one row."""
        row = LayerCache(*(lax.dynamic_slice_in_dim(a, self.row, 1) for a in self.layer))
        return row.first(length, layout)

    def located(self) -> tuple[Array, Array, Array]:
        """Keys and values of all rows, and the row: int32 [1]."""
        return *self.layer, self.row[None]

    def _put(self, cache: Array, new: Array, start: Array, axes: str, backend: Backend) -> Array:
        at = [jnp.int32(0)] * cache.ndim
        at[0], at[axes.index("S")] = self.row, start
        return backend.write_slice(cache, new.astype(cache.dtype), at, self.writes)


def _write(cache: Array, new: Array, start: Array, axes: str, backend: Backend) -> Array:
    return backend.write(cache, new.astype(cache.dtype), start, axes.index("S") - 1)


KVCache = tuple[LayerCache, ...]
AnyCache = TypeVar("AnyCache", LayerCache, SequenceCache)


def cache_axes(layout: CacheLayout) -> str:
    """Logical axes of every array of the cache, as far as they are split."""
    names = {"B": "batch", "K": "heads", "S": "length", "H": "head_dim"}
    split = layout.keys[: layout.keys.index("K") + 1]
    return " ".join(names[axis] for axis in split)


def cache_spec(plan: ParallelPlan, layout: CacheLayout) -> PartitionSpec:
    """The partition spec of every array of the cache: sequences and heads are split."""
    return plan.spec(*cache_axes(layout).split())


def cache_shapes(
    plan: ParallelPlan,
    layout: CacheLayout,
    layers: int,
    batch: int,
    length: int,
    dtype: jnp.dtype,
) -> KVCache:
    """Shapes, dtypes and shardings of a cache of `length` positions for `batch` sequences."""
    sizes = {
        "B": batch,
        "K": plan.model_devices * plan.heads.local_key_value_heads,
        "S": length,
        "H": plan.sizes.head_dim,
    }
    sharding = NamedSharding(plan.mesh, cache_spec(plan, layout))

    def shape(axes: str) -> Any:
        return jax.ShapeDtypeStruct([sizes[axis] for axis in axes], dtype, sharding=sharding)

    return tuple(LayerCache(shape(layout.keys), shape(layout.values)) for _ in range(layers))


def empty_cache(shapes: KVCache) -> KVCache:
    """A cache of such shapes, made in place."""

    def cache() -> KVCache:
        return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    return Jitted(cache, out_shardings=jax.tree.map(lambda shape: shape.sharding, shapes))()


def resized(
    plan: ParallelPlan, layout: CacheLayout, layer: LayerCache, *, batch: int, length: int
) -> LayerCache:
    """A layer with more sequences (on each part of the batch) and positions, the new ones empty."""

    def pad(array: Array, axis: int) -> Array:
        parts, old = plan.data_devices, array.shape
        shape = (parts, batch // parts, *old[1:axis], length, *old[axis + 1 :])
        split = array.reshape(parts, old[0] // parts, *old[1:])
        widths = [(0, new - now) for new, now in zip(shape, split.shape, strict=True)]
        return jnp.pad(split, widths).reshape(batch, *shape[2:])

    return LayerCache(
        pad(layer.keys, axis=layout.keys.index("S")),
        pad(layer.values, axis=layout.values.index("S")),
    )


def without_row(cache: KVCache, row: Array) -> KVCache:
    """The cache with zeros in a row: what is masked has weight 0, but 0 times NaN is NaN."""
    return jax.tree.map(lambda array: array.at[row].set(0), cache)


def cache_bytes_per_token(layers: int, heads: int, head_dim: int, dtype: jnp.dtype) -> int:
    """Bytes of cache that one token takes for `heads` key/value heads, in `dtype`."""
    return 2 * layers * heads * head_dim * jnp.dtype(dtype).itemsize
