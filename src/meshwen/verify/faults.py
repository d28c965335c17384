# SPDX-License-Identifier: Apache-2.0
"""The self-test: faults that a mesh could have are put in, and must be found where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from meshwen.ops.formats import Leaf, Packed
from meshwen.ops.weight import Weight
from meshwen.runtime.jax_settings import own_settings
from meshwen.verify.localise import Parting, Prober, RowHook, Trace, parting
from meshwen.verify.mesh_run import MeshRun
from meshwen.verify.metrics import compare
from meshwen.verify.promises import broken_by_logits
from meshwen.weights.declaration import Params, updated
from meshwen.weights.placed import Placement

ATTENTION, MLP = "attention output", "MLP output"


@dataclass(frozen=True)
class FaultFound:
    """A fault that was put in, and where the check says that bits part.

    Attributes:
        fault: what was done.
        put_at: where.
        found_at: where it was found; None: not at all.
        breaks: promises that the faulty logits break, held against the first mesh's. The bounds of
            fast numerics let small faults pass, and what a fault moves may be rounded away.
    """

    fault: str
    put_at: Parting
    found_at: Parting | None
    breaks: tuple[str, ...]

    @property
    def caught(self) -> bool:
        """Whether it was found, and at the right place."""
        return self.found_at == self.put_at


def self_test(
    run: MeshRun, prober: Prober, expected: Trace, whole: np.ndarray, first_mesh: np.ndarray
) -> list[FaultFound]:
    """Puts each fault in, one after the other, and looks for it.

    Args:
        run: a sound model on a mesh.
        prober: its prober.
        expected: the trace that a faulty one is held against: this mesh's own, or, in exact
            numerics, another mesh's.
        whole: the run's sound logits.
        first_mesh: the first mesh's, that promises are about.
    """
    layers = run.runner.config.num_hidden_layers
    head_dim = run.runner.config.head_dim
    middle, last = Parting(layers // 2, MLP), Parting(layers - 1, ATTENTION)
    order = Parting(layers // 3, MLP)
    weights = run.runner.model.weights

    def trace(place: Parting, change: Callable[[np.ndarray], np.ndarray]) -> Trace:
        return prober.trace(whole, with_changed_weight(run.runner.params, weights, place, change))

    reversing = Prober(run, reversed_sum(order))
    found = [
        ("one element of one device's weights has the wrong sign", middle, trace(middle, negated)),
        ("one layer's sum is taken in another order", order, reversing.trace(whole)),
        (
            "one head of one device is dropped",
            last,
            trace(last, lambda rows: without_head(rows, head_dim)),
        ),
    ]
    numerics, dtype = run.runner.model.numerics, run.runner.dtype.name

    def broken(faulty: Trace) -> tuple[str, ...]:
        difference = compare(first_mesh, faulty.logits)
        return tuple(broken_by_logits(numerics, dtype, {"logits": difference}))

    return [
        FaultFound(name, place, parting(expected, faulty), broken(faulty))
        for name, place, faulty in found
    ]


@own_settings()
def with_changed_weight(
    params: Params, weights: Placement, place: Parting, change: Callable[[np.ndarray], np.ndarray]
) -> Params:
    """Weights of which one device's part of the place's row-parallel weight is another.

    Nothing is copied but that part, the first one that does not hold zeros alone.
    """
    summed = [ATTENTION, MLP]
    paths = [
        placed.path
        for placed in weights.weights
        if placed.spec.layer == place.layer and placed.spec.sums_over_devices
    ]
    path = paths[summed.index(place.operation)]
    return updated(params, path, lambda w: w.with_leaf(0, lambda f: _with_changed_part(f, change)))


def negated(part: np.ndarray) -> np.ndarray:
    """The largest element with the other sign."""
    flat = np.abs(part.astype(np.float32)).argmax()
    part.flat[flat] = -part.flat[flat]
    return part


def without_head(part: np.ndarray, head_dim: int) -> np.ndarray:
    """Zeros in the rows [slots * head_dim, D] of the first query-head slot."""
    part[:head_dim] = 0
    return part


def reversed_sum(place: Parting) -> RowHook:
    """Reverses the terms of one row-parallel product: the same sum, in another order."""
    assert place.layer is not None
    number = 2 * place.layer + (place.operation == MLP)

    def hook(matmul: int, x: Array, weight: Weight) -> tuple[Array, Weight]:
        return (x[..., ::-1], _reversed(weight)) if matmul == number else (x, weight)

    return hook


def _reversed(weight: Weight) -> Weight:
    """The weight with its inputs in the opposite order."""
    return replace(weight, leaves=tuple(map(_reversed_leaf, reversed(weight.leaves))))


def _reversed_leaf(leaf: Leaf) -> Leaf:
    if isinstance(leaf, Packed):
        return leaf.format.pack(leaf.unpacked()[::-1].T, leaf.dtype)
    return leaf[::-1]


def _with_changed_part(leaf: Leaf, change: Callable[[np.ndarray], np.ndarray]) -> Leaf:
    if not isinstance(leaf, Packed):
        return _with_changed_array(leaf, lambda part: jnp.asarray(change(np.array(part))))
    format, dtype = leaf.format, leaf.dtype

    def repacked(values: Array) -> Array:
        part = np.array(format.wrap([values], leaf.shape, dtype).unpacked())
        (stored,) = jax.tree.leaves(format.pack(jnp.asarray(change(part).T), dtype))
        return stored

    (values,) = jax.tree.leaves(leaf)
    return format.wrap([_with_changed_array(values, repacked)], leaf.shape, dtype)


def _with_changed_array(array: Array, change: Callable[[Array], Array]) -> Array:
    """The array with another first part that does not hold zeros alone."""
    shards = array.addressable_shards
    parts = [shard.data for shard in shards]
    index = next(i for i, part in enumerate(parts) if np.any(np.asarray(part) != 0))
    parts[index] = jax.device_put(change(parts[index]), shards[index].device)
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)
