# SPDX-License-Identifier: Apache-2.0
"""How a model lies on a mesh: logical axes to mesh axes, and what each position of an axis holds.

A weight names its axes logically (`vocab`, `mlp`, `query`, ...). Two facts place it: the rules say
which mesh axes a logical axis is split over, and `axis_source` says which position of the original
tensor stands at each position of the axis on the devices, where an axis is padded to divide by the
mesh and key/value heads are copied. Everything else (shardings, local shapes, loading, dummy
weights, `inspect`) follows from these two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from meshwen.errors import MeshwenError
from meshwen.parallel.heads import PADDING, HeadLayout, head_layout, subtree_head_layout
from meshwen.parallel.mesh import axes_size, data_axes, model_axes
from meshwen.parallel.sizes import ModelSizes

# What each logical axis is split over: the mesh axes that carry the model, the batch, or none.
# `query` and `key_value` are heads times head_dim, `heads` is key/value heads (of the cache).
MODEL, DATA, REPLICATED = "model", "data", "replicated"
LOGICAL_AXIS_RULES: dict[str, str] = {
    "batch": DATA,
    "vocab": MODEL,
    "query": MODEL,
    "key_value": MODEL,
    "heads": MODEL,
    "mlp": MODEL,
    "embed": REPLICATED,
    "length": REPLICATED,
    "head_dim": REPLICATED,
}


@dataclass(frozen=True)
class ParallelPlan:
    """A model's layout on a mesh.

    Attributes:
        sizes: the model's.
        mesh: abstract is enough to tell the layout, with no devices behind it.
        leaves: into how many leaves the MLP's inner dimension and the vocabulary are cut, the same
            on every mesh; heads are then cut into powers of two. Exact numerics needs it: see
            `meshwen.ops.numerics.exact`. None: every axis is cut for this mesh alone.
        data_names: the mesh's axes that split the batch; all others split the model. None: those
            whose names begin with "data".

    Raises:
        MeshwenError: there is no such layout of this model on this mesh.
    """

    sizes: ModelSizes
    mesh: Mesh | AbstractMesh
    leaves: int | None = None
    data_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.leaves is None:
            return
        if self.leaves % self.model_devices:
            *fewer, most = (n for n in range(1, self.leaves + 1) if self.leaves % n == 0)
            raise MeshwenError(
                f"exact numerics splits a model over {', '.join(map(str, fewer))} or {most} "
                f"devices, not {self.model_devices}; choose another mesh, or fast numerics"
            )
        _ = self.heads  # Refuses what has no such layout now, not when weights are placed.

    @cached_property
    def model_axes(self) -> tuple[str, ...]:
        """Mesh axes, of more than one device, that split the model."""
        names = model_axes(self.mesh, self.data_names)
        return tuple(a for a in names if self.mesh.shape[a] > 1)

    @cached_property
    def data_axes(self) -> tuple[str, ...]:
        """Mesh axes, of more than one device, that split the batch."""
        names = data_axes(self.mesh) if self.data_names is None else self.data_names
        return tuple(a for a in names if self.mesh.shape[a] > 1)

    @property
    def model_devices(self) -> int:
        """Devices that one copy of the model is split over: n."""
        return axes_size(self.mesh, self.model_axes)

    @property
    def data_devices(self) -> int:
        """Copies of the model: the batch size is a multiple of it."""
        return axes_size(self.mesh, self.data_axes)

    @cached_property
    def heads(self) -> HeadLayout:
        """The head layout over the model's devices."""
        layout = head_layout if self.leaves is None else subtree_head_layout
        return layout(self.sizes.query_heads, self.sizes.key_value_heads, self.model_devices)

    @property
    def local_leaves(self) -> int:
        """Leaves of the MLP's inner dimension, and of the vocabulary, on each device; else 1."""
        return 1 if self.leaves is None else self.leaves // self.model_devices

    def leaf_tree(self, axis: str) -> tuple[int, ...]:
        """The leaves of one device's part of a contracted axis, as a nested shape; () for one.

        `query`: key/value heads, then the query heads of each; `mlp`: slices of its inner
        dimension. All leaves have the same size, on every mesh.
        """
        if self.leaves is None:
            return ()
        if axis == "query":
            return self.heads.local_key_value_heads, self.heads.group_size
        return (self.local_leaves,)

    def mesh_axes(self, axis: str) -> tuple[str, ...]:
        """The mesh axes that a logical axis is split over; () where it is replicated."""
        return {MODEL: self.model_axes, DATA: self.data_axes, REPLICATED: ()}[
            LOGICAL_AXIS_RULES[axis]
        ]

    def spec(self, *axes: str) -> PartitionSpec:
        """The partition spec of an array with these logical axes.

        Raises:
            ValueError: two of the axes are split over the same mesh axis.
        """
        entries = [self.mesh_axes(axis) for axis in axes]
        used = [name for entry in entries for name in entry]
        if len(set(used)) < len(used):
            raise ValueError(f"axes {axes} are split over the same mesh axes: {entries}")
        return PartitionSpec(*(entry or None for entry in entries))

    def sharding(self, *axes: str) -> NamedSharding:
        """The sharding of an array with these logical axes."""
        return NamedSharding(self.mesh, self.spec(*axes))

    def axis_source(self, axis: str) -> np.ndarray:
        """For each position of a weight's axis on the devices, its position in the checkpoint.

        Returns:
            int64 [padded size], `PADDING` (-1) where the position holds zeros.
        """
        size = self.sizes[axis]
        if axis == "query":
            return _head_rows(self.heads.device_query_heads(), self.sizes.head_dim)
        if axis == "key_value":
            return _head_rows(self.heads.device_key_value_heads(), self.sizes.head_dim)
        shards = self._shards(axis)
        source = np.arange(ceil(size / shards) * shards)
        source[size:] = PADDING
        return source

    def axis_length(self, axis: str) -> int:
        """Size of a weight's logical axis on all devices together: of what `axis_source` returns.

        Without an array of that size: `inspect` asks it of models that fit nowhere.
        """
        heads = self.heads
        if axis == "query":
            return heads.devices * heads.local_query_heads * self.sizes.head_dim
        if axis == "key_value":
            return heads.devices * heads.local_key_value_heads * self.sizes.head_dim
        shards = self._shards(axis)
        return ceil(self.sizes[axis] / shards) * shards

    def _shards(self, axis: str) -> int:
        """How many equal parts an axis that is no axis of heads is padded to."""
        if self.leaves is not None and axis in ("mlp", "vocab"):
            return self.leaves
        return axes_size(self.mesh, self.mesh_axes(axis))


def _head_rows(heads: np.ndarray, head_dim: int) -> np.ndarray:
    """The rows of a projection that are those of heads: int64 [heads * head_dim]."""
    rows = heads.reshape(-1, 1) * head_dim + np.arange(head_dim)
    rows[heads.reshape(-1) == PADDING] = PADDING
    return rows.reshape(-1)
