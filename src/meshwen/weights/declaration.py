# SPDX-License-Identifier: Apache-2.0
"""A weight's declaration: the one place that says what it is.

An architecture's file declares its weights. Shapes, shardings, loading, dummy values, costs,
`inspect` and the checks for missing and unexpected tensors all derive from the declaration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from meshwen.parallel.sizes import ModelSizes

# The weights of a model or of a part of it: a nested dict by Hugging Face name, of
# `meshwen.ops.weight.Weight`.
Params = dict[str, Any]


# What a matmul gives whose inputs are split along a logical axis: a sum over the devices.
_SUMS = {"query": "attention output", "mlp": "MLP output"}


class Part(StrEnum):
    """The part of a model that a weight belongs to."""

    EMBEDDING = "embedding"
    QUERY_OUTPUT = "query and output projections"
    KEY_VALUE = "key and value projections"
    MLP = "MLP"
    NORM = "norms"
    HEAD = "output head"


@dataclass(frozen=True)
class WeightDeclaration:
    """One tensor of a checkpoint.

    Attributes:
        name: Hugging Face's. The pytree of weights mirrors it: `model.norm.weight` is
            `params["model"]["norm"]["weight"]`.
        axes: its logical axes, in the checkpoint's order.
        part: of the model.
        linear: it is a projection `[out, in]`, which rows are multiplied with.
        layer: the decoder layer that it belongs to; None for none.
        every_token: keys and values are computed with it, so every token of a prompt needs it in
            the last layer too, where other weights meet the last token alone.
        tied: another name under which a file may hold it too, as it is also the output head.
        dummy_mean: mean of its dummy values.
    """

    name: str
    axes: tuple[str, ...]
    part: Part
    linear: bool = False
    layer: int | None = None
    every_token: bool = False
    tied: str | None = None
    dummy_mean: float = 0.0

    def shape(self, sizes: ModelSizes) -> tuple[int, ...]:
        """Shape in the checkpoint."""
        return tuple(sizes[axis] for axis in self.axes)

    @property
    def sums_over_devices(self) -> bool:
        """Whether devices split its inputs, so that a matmul with it is a sum over them."""
        return self.linear and self.axes[-1] in _SUMS

    @property
    def sum_name(self) -> str:
        """What a sum over the devices gives."""
        return _SUMS[self.axes[-1]]


def unflatten(leaves: Iterable[tuple[str, Any]] | Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict from dotted names, with lists where the names count from 0."""
    items = leaves.items() if isinstance(leaves, Mapping) else leaves
    tree: dict[str, Any] = {}
    for name, leaf in items:
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return _lists(tree)


def at(tree: Any, path: str) -> Any:
    """The leaf of a nested dict at a dotted name."""
    for key in path.split("."):
        tree = tree[int(key) if isinstance(tree, list) else key]
    return tree


def updated(tree: Any, path: str, change: Callable[[Any], Any]) -> Any:
    """A nested dict with another leaf at a dotted name; what is beside it is shared."""
    if not path:
        return change(tree)
    key, _, rest = path.partition(".")
    if isinstance(tree, list):
        return [updated(n, rest, change) if i == int(key) else n for i, n in enumerate(tree)]
    return {**tree, key: updated(tree[key], rest, change)}


def _lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    children = {key: _lists(child) for key, child in node.items()}
    if all(key.isdigit() for key in children):
        return [children[key] for key in sorted(children, key=int)]
    return children
