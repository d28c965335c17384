# SPDX-License-Identifier: Apache-2.0
"""The self-test: faults that a mesh could have are injected, and must be found where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from meshwen.errors import MeshwenError
from meshwen.ops.formats import Leaf, Packed
from meshwen.ops.weight import Weight
from meshwen.runtime.jax_settings import own_settings
from meshwen.verify.localise import Prober, Trace, first_divergence
from meshwen.verify.mesh_run import MeshRun
from meshwen.verify.metrics import compare
from meshwen.verify.operations import Operation, row_parallel
from meshwen.verify.promises import broken_by_logits, logit_bounds
from meshwen.verify.recording import RowHook
from meshwen.weights.declaration import Params, updated
from meshwen.weights.layout import WeightTable

# What each number of one device's part [in, out] is multiplied with: -1, 0 or 1.
Factors = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Fault:
    """A fault that was injected, and where the check says that it is.

    Attributes:
        name: what was done.
        operation: the one whose result it changes.
        first_divergence: where it was found; None: not at all.
        breaks: promises that the faulty logits break, held against the first mesh's. The bounds of
            fast numerics let small faults pass, and what a fault moves may be rounded away.
    """

    name: str
    operation: Operation
    first_divergence: Operation | None
    breaks: tuple[str, ...]

    @property
    def caught(self) -> bool:
        """Whether it was found, and at the right place."""
        return self.first_divergence == self.operation


def self_test(
    run: MeshRun, prober: Prober, expected: Trace, whole: np.ndarray, first_mesh: np.ndarray
) -> list[Fault]:
    """Injects each fault, one after the other, and looks for it.

    Args:
        run: a sound model on a mesh.
        prober: its prober.
        expected: the trace that a faulty one is held against: this mesh's own, or, in exact
            numerics, another mesh's.
        whole: the run's sound logits.
        first_mesh: the first mesh's, that promises are about.
    """
    model, params = run.runner.model, run.runner.params
    matmuls = row_parallel(model.weights)
    of_heads = [one for one, weight in matmuls.items() if weight.declaration.axes[-1] == "query"]
    others = [one for one in matmuls if one not in of_heads]
    middle, third, last = others[len(others) // 2], others[len(others) // 3], of_heads[-1]

    def trace(operation: Operation, factors: Factors) -> Trace:
        return prober.trace(whole, with_changed_weight(params, model.weights, operation, factors))

    def first_head(part: np.ndarray) -> np.ndarray:
        return without_head(part, model.config.head_dim)

    faulty = [
        ("one element of one device's weights has the wrong sign", middle, trace(middle, negated)),
        (
            "one layer's sum is taken in another order",
            third,
            Prober(run, reversed_sum(third)).trace(whole),
        ),
        ("one head of one device is dropped", last, trace(last, first_head)),
    ]

    def broken(found: Trace) -> tuple[str, ...]:
        difference = compare(first_mesh, found.logits)
        bounds = logit_bounds(model.dtype.name, model.weights.format)
        return tuple(broken_by_logits(model.numerics, bounds, {"logits": difference}))

    return [
        Fault(name, operation, first_divergence(expected, found), broken(found))
        for name, operation, found in faulty
    ]


@own_settings()
def with_changed_weight(
    params: Params, weights: WeightTable, operation: Operation, factors: Factors
) -> Params:
    """Weights of which one device's part of a row-parallel matmul's weight is another.

    Nothing is copied but that part, the first one of this process's that does not hold zeros alone.

    Raises:
        MeshwenError: they all do.
    """
    path = row_parallel(weights)[operation].path
    changed = partial(_changed, factors=factors, name=path)
    return updated(params, path, lambda weight: weight.with_leaf(0, changed))


def negated(part: np.ndarray) -> np.ndarray:
    """The largest element gets the other sign."""
    factors = np.ones(part.shape, np.int8)
    factors.flat[np.abs(part.astype(np.float32)).argmax()] = -1
    return factors


def without_head(part: np.ndarray, head_dim: int) -> np.ndarray:
    """The inputs of the first query head become zero."""
    factors = np.ones(part.shape, np.int8)
    factors[:head_dim] = 0
    return factors


def reversed_sum(operation: Operation) -> RowHook:
    """Reverses the terms of one row-parallel matmul: the same sum, in another order."""

    def hook(matmul: Operation, x: Array, weight: Weight) -> tuple[Array, Weight]:
        return (x[..., ::-1], _reversed(weight)) if matmul == operation else (x, weight)

    return hook


def _reversed(weight: Weight) -> Weight:
    """The weight with its inputs in the opposite order; a format that rounds does so again."""
    return replace(weight, leaves=tuple(map(_reversed_leaf, reversed(weight.leaves))))


def _reversed_leaf(leaf: Leaf) -> Leaf:
    if isinstance(leaf, Packed):
        return leaf.format.pack(leaf.unpacked()[::-1].T, leaf.dtype)
    return leaf[::-1]


def _changed(leaf: Leaf, factors: Factors, name: str) -> Leaf:
    """The leaf with another first part that does not hold zeros alone."""
    parts = _parts(leaf)
    for i, part in enumerate(parts):
        numbers = np.asarray(part.unpacked() if isinstance(part, Packed) else part)
        if np.any(numbers != 0):
            parts[i] = _times(part, factors(numbers))
            return jax.tree.map(_on_the_same_devices, leaf, *parts)
    raise MeshwenError(
        f"the self-test cannot change {name}: on the devices of this process it holds zeros "
        "alone; verify on fewer devices, or without --self-test"
    )


def _parts(leaf: Leaf) -> list[Leaf]:
    """What each device of this process holds of a leaf."""
    arrays, tree = jax.tree.flatten(leaf)
    held = [[shard.data for shard in array.addressable_shards] for array in arrays]
    return [jax.tree.unflatten(tree, part) for part in zip(*held, strict=True)]


def _times(part: Leaf, factors: np.ndarray) -> Leaf:
    """One device's part, times -1, 0 or 1."""
    if isinstance(part, Packed):
        return part.times(jnp.asarray(factors))
    return part * jnp.asarray(factors, part.dtype)


def _on_the_same_devices(array: Array, *parts: Array) -> Array:
    """An array of other parts, those of this process, in the order of its own."""
    shards = zip(array.addressable_shards, parts, strict=True)
    placed = [jax.device_put(part, shard.device) for shard, part in shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, placed)
