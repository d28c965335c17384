# SPDX-License-Identifier: Apache-2.0
"""How exact numerics orders its sums: the leaves, and the tree that adds them, for `inspect`."""

from __future__ import annotations

from math import prod
from typing import Any

from meshwen.parallel.plan import ParallelPlan

_MOST_NAMES = 16


def sums_report(plan: ParallelPlan) -> dict[str, Any] | None:
    """The sums that cross devices: leaves of each device, and the tree; None in fast numerics."""
    if not plan.exact:
        return None
    heads, devices = plan.heads, plan.model_devices
    inner = plan.axis_length("mlp")
    mlp = plan.leaves("mlp")[0] * devices
    return {
        "attention output": {
            "leaf": f"one query-head slot: {plan.sizes.head_dim} inputs",
            "leaves_per_device": prod(plan.leaves("query")),
            "device_tree": _groups(heads.local_key_value_heads, heads.group_size),
        },
        "MLP output": {
            "leaf": f"1/{mlp} of the inner dimension: {inner // mlp} inputs",
            "leaves_per_device": mlp // devices,
            "device_tree": tree_text([str(i) for i in range(mlp // devices)]),
        },
        "across_devices": tree_text([f"d{i}" for i in range(devices)]),
    }


def tree_text(names: list[str]) -> str:
    """The additions of a binary tree, neighbours first: ((0+1)+(2+3)).

    Of many names only the ends are shown.
    """
    if len(names) > _MOST_NAMES:
        return f"{tree_text(names[:4])} + ... + {tree_text(names[-4:])}, pairs of neighbours"
    while len(names) > 1:
        pairs = [f"({a}+{b})" for a, b in zip(names[::2], names[1::2], strict=False)]
        names = pairs + names[2 * len(pairs) :]
    return names[0]


def _groups(groups: int, slots: int) -> str:
    """The tree of query-head slots: first those of each key/value head."""
    subtrees = [tree_text([str(g * slots + s) for s in range(slots)]) for g in range(groups)]
    return tree_text(subtrees)
