# SPDX-License-Identifier: Apache-2.0
"""The arrays of a key/value cache: blocks of a pool, or a row a sequence; a device's own heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int32

from meshwen.ops.backend import Backend
from meshwen.ops.cache_layout import CacheLayout, axes_in_order
from meshwen.parallel.plan import ParallelPlan
from meshwen.runtime.jax_settings import Jitted

_COMPUTED = "BSKH"  # the order in which a layer computes keys and values


class LayerCache(NamedTuple):
    """Keys and values of one layer, their axes in the order of the back end's `cache_layout`.

    The engine's are KV blocks: `meshwen.ops.paged` says where in them a position is. Those of
    programs for other stacks are rows: position p of a sequence is at index p of the axis S of its
    row. Both arrays have the dtype of the weights.
    """

    keys: Array
    values: Array

    @classmethod
    def of(cls, keys: Array, values: Array, layout: CacheLayout) -> LayerCache:
        """Rows of keys and values [B, T, K, H] as a layer computes them."""
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


def _write(cache: Array, new: Array, start: Array, axes: str, backend: Backend) -> Array:
    return backend.write(cache, new.astype(cache.dtype), start, axes.index("S") - 1)


KVCache = tuple[LayerCache, ...]


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
    head_dim: int | None = None,
) -> KVCache:
    """Shapes, dtypes and shardings of a cache of `batch` rows, or blocks, of `length` positions."""
    sizes = {
        "B": batch,
        "K": plan.model_devices * plan.heads.local_key_value_heads,
        "S": length,
        "H": head_dim or plan.sizes.head_dim,
    }
    sharding = NamedSharding(plan.mesh, cache_spec(plan, layout))

    def shape(axes: str) -> Any:
        return jax.ShapeDtypeStruct([sizes[axis] for axis in axes], dtype, sharding=sharding)

    return tuple(LayerCache(shape(layout.keys), shape(layout.values)) for _ in range(layers))


def empty_blocks(shapes: KVCache, backend: Backend) -> KVCache:
    """KV blocks of such shapes that nothing has been written to, made in place."""

    def blocks() -> KVCache:
        def own(shape: Any) -> Array:
            return backend.empty_blocks(shape.sharding.shard_shape(shape.shape), shape.dtype)

        return jax.tree.map(own, shapes)

    # By each device, as a kernel may make its part.
    some = jax.tree.leaves(shapes)[0].sharding
    specs = jax.tree.map(lambda shape: shape.sharding.spec, shapes)
    mapped = jax.shard_map(blocks, mesh=some.mesh, in_specs=(), out_specs=specs, check_vma=False)
    return Jitted(mapped)()


def copied_blocks(
    cache: KVCache, source: Int32[Array, " n"], destination: Int32[Array, " n"], backend: Backend
) -> KVCache:
    """The cache with some blocks as copies of others; on each device under `shard_map`.

    Written as tokens are, which every back end does in place.
    """
    layout, size = backend.cache_layout, backend.block_size
    slots = (destination[:, None] * size + jnp.arange(size, dtype=jnp.int32)).reshape(-1)

    def tokens(blocks: Array, axes: str) -> Array:
        """[n * S, K, H]"""
        some = axes_in_order(blocks[source], axes, _COMPUTED)
        return some.reshape(-1, *some.shape[2:])

    def copied(layer: LayerCache) -> LayerCache:
        new = tokens(layer.keys, layout.keys), tokens(layer.values, layout.values)
        return LayerCache(*backend.write_blocks(layer, new, slots))

    return tuple(map(copied, cache))


def cache_bytes_per_token(layers: int, heads: int, head_dim: int, dtype: jnp.dtype) -> int:
    """Bytes of cache that one token takes for `heads` key/value heads, in `dtype`."""
    return 2 * layers * heads * head_dim * jnp.dtype(dtype).itemsize
