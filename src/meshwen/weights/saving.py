# SPDX-License-Identifier: Apache-2.0
"""Weights from the devices: the tensors of a checkpoint, each put together when it is read.

The inverse of `meshwen.weights.loading`, by the same `WeightLayout.positions`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import jax
import numpy as np
from jax import Array

from meshwen.ops.formats import Leaf, Packed
from meshwen.ops.weight import Weight
from meshwen.runtime.jax_settings import Jitted, own_settings
from meshwen.weights.declaration import Params, at
from meshwen.weights.layout import WeightLayout, WeightTable, matching_slices
from meshwen.weights.loading import row_major
from meshwen.weights.source import Index, TensorSource


def held_tensors(params: Params, table: WeightTable) -> dict[str, TensorSource]:
    """What a checkpoint of these weights holds, by Hugging Face name, in the forward pass's order.

    Reading one gathers it on the host; none is kept. `load_params` gives the same bits again on the
    same mesh. Where the table's format rounds, all are float32: numbers that are rounded to what is
    held. (Not so, maybe, an output head that is tied to a table which loading rounded too.)

    Args:
        params: laid out as `table` says, on devices of this process.
        table: the model's.
    """
    rounds = table.format is not None and table.format.rounds
    dtype = np.dtype(np.float32) if rounds else table.dtype
    held: dict[str, TensorSource] = {}
    for layout in table.stored:
        if layout.path != layout.declaration.name:
            continue  # A copy of a tied table, in the place of the output head.
        shape = layout.declaration.shape(layout.plan.sizes)
        held[layout.path] = HeldTensor(
            name=layout.path,
            shape=shape,
            dtype=dtype,
            nbytes=prod(shape) * dtype.itemsize,
            weight=at(params, layout.path),
            layout=layout,
        )
    return held


def held_sha256(params: Params, table: WeightTable) -> str:
    """SHA-256 over what a checkpoint of these weights holds: every number, the same on every mesh.

    Args:
        params, table: as `held_tensors` takes them.
    """
    digest = hashlib.sha256()
    for name, tensor in held_tensors(params, table).items():
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor.read()).view(np.uint8).data)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldTensor(TensorSource):
    """A tensor that a model on a mesh holds."""

    weight: Weight
    layout: WeightLayout

    @own_settings()
    def read(self, index: Index = ()) -> np.ndarray:
        """The tensor, or a part of it; the whole is gathered either way."""
        whole, everything = np.zeros(self.shape, self.dtype), tuple(slice(0, n) for n in self.shape)
        for number, leaf in enumerate(self.weight.leaves):
            positions = self.layout.positions(number)
            for place, part in _parts(leaf, self.layout):
                own = [axis[i] for axis, i in zip(positions, place, strict=True)]
                if self.layout.inputs_first:
                    own.reverse()
                for here, there in matching_slices(own):
                    if there == everything:
                        return part[here][index].astype(self.dtype, copy=False)
                    whole[there] = part[here]
        return whole[index]


def _parts(leaf: Leaf, layout: WeightLayout) -> Iterator[tuple[Index, np.ndarray]]:
    """Where each device's part of a leaf is, and the part with its axes in the checkpoint's order.

    Of copies on several devices, one.
    """
    places = layout.array_sharding.devices_indices_map(layout.leaf_shape)
    for shards in zip(*(array.addressable_shards for array in jax.tree.leaves(leaf)), strict=True):
        if shards[0].replica_id == 0:
            place = places[shards[0].device]
            assert place is not None  # Only a sharding that names no devices gives None.
            yield place, _in_order([np.asarray(s.data) for s in shards], leaf, layout.inputs_first)


def _in_order(arrays: list[np.ndarray], leaf: Leaf, inputs_first: bool) -> np.ndarray:
    """One device's part of a leaf, of what it stores."""
    if isinstance(leaf, Packed):
        # By the first device, for the others too: each would compile it for itself.
        return np.asarray(_repackable(leaf.format.wrap(arrays, leaf.shape, leaf.dtype)))  # type: ignore[arg-type]
    (array,) = arrays
    return row_major(array.T, array.dtype) if inputs_first else array


@Jitted
def _repackable(packed: Packed) -> Array:
    return packed.repackable()
