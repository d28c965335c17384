# SPDX-License-Identifier: Apache-2.0
"""How exact numerics orders its sums: the leaves, and the tree that adds them, for `inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meshwen.ops.ordered import added_in_tree, added_in_trees
from meshwen.verify.operations import row_parallel
from meshwen.weights.layout import WeightLayout, WeightTable

_MOST_NAMES = 16


def sums_report(weights: WeightTable) -> dict[str, Any] | None:
    """The sums that cross devices: leaves of each device, and the tree; None in fast numerics."""
    plan = weights.plan
    if plan.leaves is None:
        return None
    # In all layers alike.
    sums = {operation.name: _sum(weight) for operation, weight in row_parallel(weights).items()}
    return sums | {"across_devices": tree_text([f"d{i}" for i in range(plan.model_devices)])}


def _sum(weight: WeightLayout) -> dict[str, Any]:
    axis, plan = weight.declaration.axes[-1], weight.plan
    leaves = weight.leaves * plan.model_devices
    leaf = "one query head" if axis == "query" else f"1/{leaves} of the inner dimension"
    names = [str(i) for i in range(weight.leaves)]
    return {
        "leaf": f"{leaf}: {plan.axis_length(axis) // leaves} inputs",
        "leaves_per_device": weight.leaves,
        "device_tree": added_in_trees(names, weight.tree, tree_text),
    }


def tree_text(names: Sequence[str]) -> str:
    """The additions of a binary tree, neighbours first: ((0+1)+(2+3)).

    Of many names only the ends are shown.
    """
    if len(names) > _MOST_NAMES:
        return f"{tree_text(names[:4])} + ... + {tree_text(names[-4:])}, pairs of neighbours"
    return added_in_tree(names, lambda a, b: f"({a}+{b})")
