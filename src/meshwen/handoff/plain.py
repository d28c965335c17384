# SPDX-License-Identifier: Apache-2.0
"""Weights and caches as dicts, lists and arrays, and nothing else.

Other stacks, and `jax.export`, know no types of this package. A weight is an array; in int8 a dict
of `values` and `scales`; in exact numerics, where the inputs of a matmul are split over devices, a
list with one of these for each leaf of the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from meshwen.cache.kv_cache import KVCache, LayerCache
from meshwen.errors import MeshwenError
from meshwen.ops.formats import Leaf, Packed
from meshwen.ops.weight import Weight
from meshwen.weights.declaration import Params, at, unflatten
from meshwen.weights.layout import WeightLayout, WeightTable

Plain = Any  # Dicts with text for keys, lists, and arrays or what stands for them.


def plain_params(params: Params, table: WeightTable) -> Plain:
    """The weights of a model, named as in a checkpoint.

    Args:
        params: as the table lays them out.
        table: of the model.
    """
    return _tree(table, lambda layout: plain_weight(at(params, layout.path)))


def plain_weight(weight: Weight) -> Plain:
    """One weight."""
    leaves = [_plain_leaf(leaf) for leaf in weight.leaves]
    return leaves if weight.tree else leaves[0]


def typed_params(plain: Plain, table: WeightTable) -> Params:
    """The weights that `plain_params` made plain."""

    def typed(layout: WeightLayout) -> Weight:
        found = at(plain, layout.path)
        leaves = tuple(_typed_leaf(one, layout, table) for one in _leaves(found, layout))
        return Weight(leaves, layout.inputs_first, layout.tree)

    return _tree(table, typed)


def params_specs(table: WeightTable) -> Plain:
    """The partition specs of plain weights, one for each array."""

    def specs(layout: WeightLayout) -> Plain:
        return jax.tree.map(lambda _: layout.sharding.spec, _weight_shapes(layout, table))

    return _tree(table, specs)


def params_shapes(table: WeightTable) -> Plain:
    """Shapes, dtypes and shardings of plain weights."""
    return _tree(table, lambda layout: _weight_shapes(layout, table))


def check_params(plain: Plain, table: WeightTable) -> None:
    """Holds plain weights against the shapes of a model's.

    Raises:
        MeshwenError: they are those of another model or mesh, or not plain.
    """
    expected = params_shapes(table)
    structure: Any = jax.tree.structure(plain)
    if structure != jax.tree.structure(expected):
        raise MeshwenError(
            "params are not the weights of this model as meshwen.handoff.plain_params gives them"
        )
    for (name, given), (_, needed) in zip(names(plain), names(expected), strict=True):
        if (shape := jnp.shape(given)) != needed.shape or given.dtype != needed.dtype:
            raise MeshwenError(
                f"params: {name} is {given.dtype} {list(shape)}, not {needed.dtype} "
                f"{list(needed.shape)} as for this model on this mesh: load the weights for it"
            )


def plain_cache(cache: KVCache) -> Plain:
    """A list with keys and values of each layer."""
    return [layer._asdict() for layer in cache]


def typed_cache(plain: Plain) -> KVCache:
    """The cache that `plain_cache` made plain."""
    return tuple(LayerCache(**layer) for layer in plain)


def names(plain: Plain, prefix: str = "") -> list[tuple[str, Any]]:
    """Each array with its dotted name, in the order in which JAX flattens them."""
    found = jax.tree_util.tree_flatten_with_path(
        plain, is_leaf=lambda node: isinstance(node, PartitionSpec)
    )[0]
    return [(".".join([prefix, *map(_key, path)]).lstrip("."), leaf) for path, leaf in found]


def _key(key: Any) -> str:
    return str(key.key if hasattr(key, "key") else key.idx)


def _tree(table: WeightTable, make: Callable[[WeightLayout], Any]) -> Plain:
    return unflatten((layout.path, make(layout)) for layout in table.stored)


def _leaves(plain: Plain, layout: WeightLayout) -> list[Plain]:
    return plain if layout.tree else [plain]


def _plain_leaf(leaf: Leaf) -> Plain:
    if not isinstance(leaf, Packed):
        return leaf
    # What is not static of a packed matrix: its arrays, in the order of its pytree.
    arrays = jax.tree.leaves(leaf)
    return dict(zip((f.name for f in fields(leaf)), arrays, strict=False))  # type: ignore[arg-type]


def _typed_leaf(plain: Plain, layout: WeightLayout, table: WeightTable) -> Leaf:
    if layout.format is None:
        array: Array = plain
        return array
    inputs, outputs = layout.leaf_shard_shape
    packed = _packed_shape(layout, table)
    return layout.format.wrap([plain[name] for name in packed], (inputs, outputs), table.dtype)


def _weight_shapes(layout: WeightLayout, table: WeightTable) -> Plain:
    leaves = [_leaf_shapes(layout, table) for _ in range(layout.leaves)]
    return leaves if layout.tree else leaves[0]


def _leaf_shapes(layout: WeightLayout, table: WeightTable) -> Plain:
    """Of all devices' parts together."""
    if layout.format is None:
        return jax.ShapeDtypeStruct(layout.leaf_shape, table.dtype, sharding=layout.sharding)
    (inputs, outputs), (whole_inputs, whole_outputs) = layout.leaf_shard_shape, layout.leaf_shape

    def whole(part: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        first, second, *rest = part.shape
        shape = (first * (whole_outputs // outputs), second * (whole_inputs // inputs), *rest)
        return jax.ShapeDtypeStruct(shape, part.dtype, sharding=layout.sharding)

    return {name: whole(part) for name, part in _packed_shape(layout, table).items()}


def _packed_shape(layout: WeightLayout, table: WeightTable) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of one device's part of a leaf, by name."""
    assert layout.format is not None
    inputs, outputs = layout.leaf_shard_shape
    part = jax.ShapeDtypeStruct((outputs, inputs), jnp.float32)
    packed = jax.eval_shape(lambda x: layout.format.pack(x, table.dtype), part)  # type: ignore[union-attr]
    return _plain_leaf(packed)
