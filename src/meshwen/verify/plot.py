# SPDX-License-Identifier: Apache-2.0
"""The plot of `divergence_plot.html.jinja`: relative differences over the operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meshwen.verify.picture import LARGEST, SMALLEST, height

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 900, 260, 52, 40


def divergence_plot(
    operations: Sequence[str], lines: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Coordinates of the plot.

    Args:
        operations: their keys, from left to right.
        lines: relative differences of all operations, by the line's label.
    """
    step = (_WIDTH - _LEFT - 20) / max(1, len(operations) - 1)
    top, drawn = 12, _HEIGHT - _BOTTOM - 12
    every = -(-len(operations) // 16)
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "floor": top + drawn,
        "lines": [
            {
                "label": label,
                "points": [
                    (round(_LEFT + i * step, 1), round(top + drawn * (1 - height(value)), 1))
                    for i, value in enumerate(values)
                ],
            }
            for label, values in lines.items()
        ],
        "ticks": [
            (round(top + drawn * (1 - height(10.0**power)), 1), power)
            for power in range(SMALLEST, LARGEST + 1, 2)
        ],
        "labels": [
            (round(_LEFT + i * step, 1), _short(name))
            for i, name in enumerate(operations)
            if i % every == 0
        ],
    }


def _short(operation: str) -> str:
    """A name that fits under the plot: `3:MLP output` becomes `3 mlp`."""
    layer, _, name = operation.rpartition(":")
    return f"{layer} {name[:3].lower()}" if layer else name.split()[-1]
