# SPDX-License-Identifier: Apache-2.0
"""How weights are laid out on the devices of a mesh: padded, split, in a format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, product
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from meshwen.ops.formats import Format, array_bytes
from meshwen.ops.weight import Weight
from meshwen.parallel.heads import PADDING
from meshwen.parallel.plan import ParallelPlan
from meshwen.weights.declaration import WeightDeclaration, unflatten
from meshwen.weights.source import Index


@dataclass(frozen=True)
class WeightLayout:
    """How one weight is laid out on the devices of a mesh; its numbers are a `Weight`.

    Projections are `[out, in]` in a checkpoint, `[in, out]` on the devices.

    Attributes:
        declaration: what it is in a checkpoint.
        path: where it stands in the pytree, a dotted name.
        plan: how the model lies on the mesh.
        inputs_first: whether it is a matrix [in, out] on the devices; else as in the checkpoint.
        format: how its matrices are packed; None for arrays.
        tree: the leaves of each device's part, as a nested shape; () for one. Leaves are equal
            parts of the last axis in the checkpoint.
    """

    declaration: WeightDeclaration
    path: str
    plan: ParallelPlan
    inputs_first: bool
    format: Format | None = None
    tree: tuple[int, ...] = ()

    @property
    def leaves(self) -> int:
        """How many there are on a device."""
        return prod(self.tree)

    def positions(self, leaf: int = 0) -> list[np.ndarray]:
        """For each axis of a leaf on the devices, which position of the checkpoint's stands where.

        See `ParallelPlan.axis_source`.
        """
        sources = [self.plan.axis_source(axis) for axis in self.declaration.axes]
        if self.tree:
            parts = sources[-1].reshape(self.plan.model_devices, self.leaves, -1)
            sources[-1] = parts[:, leaf].reshape(-1)
        return sources[::-1] if self.inputs_first else sources

    @property
    def axes(self) -> tuple[str, ...]:
        """Logical axes in the order kept on the devices."""
        return self.declaration.axes[::-1] if self.inputs_first else self.declaration.axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape on all devices together, padding and copies included."""
        return tuple(self.plan.axis_length(axis) for axis in self.axes)

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """Shape of a leaf on all devices together."""
        sizes = [self.plan.axis_length(axis) for axis in self.declaration.axes]
        sizes[-1] //= self.leaves
        return tuple(sizes[::-1] if self.inputs_first else sizes)

    @property
    def array_sharding(self) -> NamedSharding:
        """Sharding of arrays of `shape` and `leaf_shape`."""
        return self.plan.sharding(*self.axes)

    @property
    def sharding(self) -> NamedSharding:
        """Sharding of what is stored: of the array, or of all arrays of a packed matrix."""
        return self.plan.sharding(*self.declaration.axes) if self.format else self.array_sharding

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of one device's part, of all leaves; without the padding of a format."""
        return self.array_sharding.shard_shape(self.shape)

    @property
    def leaf_shard_shape(self) -> tuple[int, ...]:
        """Shape of one device's part of a leaf."""
        return self.array_sharding.shard_shape(self.leaf_shape)

    def nbytes(self, dtype: jnp.dtype) -> int:
        """Bytes on each device."""
        return self.leaves * self.stored_bytes(self.leaf_shard_shape, dtype)

    def model_bytes(self, dtype: jnp.dtype) -> int:
        """Bytes of the whole weight, without padding to the mesh and without copies."""
        shape = self.declaration.shape(self.plan.sizes)
        return self.stored_bytes(shape[::-1] if self.inputs_first else shape, dtype)

    def stored_bytes(self, shape: tuple[int, ...], dtype: jnp.dtype) -> int:
        """Bytes of a part of some shape."""
        if self.format is None:
            return array_bytes(shape, dtype)
        inputs, outputs = shape
        return self.format.nbytes((outputs, inputs), dtype)

    def partition_specs(self) -> Weight:
        """A pytree of partition specs, one for each leaf."""
        return Weight((self.sharding.spec,) * self.leaves, self.inputs_first, self.tree)  # type: ignore[arg-type]


@dataclass(frozen=True)
class WeightTable:
    """The layouts of all weights of a model; their numbers are `Params`.

    Attributes:
        plan: how the model lies on the mesh.
        declarations: of the model's weights, in the order of the forward pass.
        dtype: of arrays, and what numbers are rounded to before they are packed.
        format: of the matrices that rows are multiplied with; None: arrays.
    """

    plan: ParallelPlan
    declarations: tuple[WeightDeclaration, ...]
    dtype: np.dtype[Any]
    format: Format | None

    @cached_property
    def declared(self) -> tuple[WeightLayout, ...]:
        """Every declared weight, as if a tied table were looked up in alone."""
        return tuple(self._layout(one, one.name, one.linear) for one in self.declarations)

    @cached_property
    def stored(self) -> tuple[WeightLayout, ...]:
        """Every weight that the devices store, in the order of the forward pass.

        These are the declared ones; but a tied embedding table is packed where kernels multiply
        with it, and looked up so. Where the format rounds, it also stands in the place of the
        output head, as a lookup is of numbers that are not rounded; so does it where the
        plan has leaves, without kernels: the head's matmul is cut along the hidden size.
        """
        found = list(self.declared)
        for i, weight in enumerate(self.declared):
            if weight.declaration.tied is None:
                continue
            as_head = self.as_head(weight.declaration)
            if self.format is not None and not self.format.rounds:
                found[i] = replace(as_head, path=weight.path)
            elif self.format is not None or self.plan.leaves is not None:
                found.append(as_head)
        return tuple(found)

    def as_head(self, table: WeightDeclaration) -> WeightLayout:
        """A tied embedding table in the place of the output head, to be multiplied with."""
        assert table.tied is not None
        return self._layout(table, table.tied, multiplied=True)

    def partition_specs(self) -> dict[str, Any]:
        """A pytree like that of the weights, of partition specs."""
        return unflatten((weight.path, weight.partition_specs()) for weight in self.stored)

    @property
    def parameters(self) -> int:
        """Parameters of the model as published: no padding, no copies, tied embeddings once."""
        return sum(prod(one.shape(self.plan.sizes)) for one in self.declarations)

    @property
    def nbytes(self) -> int:
        """Bytes of weights on each device."""
        return sum(weight.nbytes(self.dtype) for weight in self.stored)

    def _layout(self, declared: WeightDeclaration, path: str, multiplied: bool) -> WeightLayout:
        tree: tuple[int, ...] = ()
        # Slices of one array would do, did XLA's CPU back end not copy them: a step of bfloat16
        # matmuls then takes 4 times as long.
        if declared.sums_over_devices:
            tree = self.plan.leaf_tree(declared.axes[-1])
        format = self.format if multiplied else None
        return WeightLayout(declared, path, self.plan, multiplied, format, tree)


def matching_slices(positions: Sequence[np.ndarray]) -> Iterator[tuple[Index, Index]]:
    """Which slices of a part of a tensor are which slices of the tensor; padding is in none.

    Args:
        positions: of each axis of the part, which position of the tensor's stands where.
    """
    for corner in product(*(list(_runs(of_axis)) for of_axis in positions)):
        yield tuple(here for here, _ in corner), tuple(there for _, there in corner)


def _runs(positions: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Runs of consecutive positions, padding left out: (slice of the part, of the original)."""
    breaks = (np.diff(positions) != 1) | (positions[:-1] == PADDING)
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(positions)]
    for start, stop in pairwise(edges):
        first = int(positions[start])
        if first != PADDING:
            yield slice(start, stop), slice(first, first + stop - start)
