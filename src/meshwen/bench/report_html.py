# SPDX-License-Identifier: Apache-2.0
"""A benchmark as one HTML file: its tables, and where they lie under the machine's roofline."""

from __future__ import annotations

import math
from typing import Any

from meshwen.pages import render

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 900, 420, 64, 20, 16, 44
_LETTER, _LINE, _NEAR = 8, 13, 8  # Pixels: of a label's letter and line, and away from its point.
_Box = tuple[float, float, float, float]  # Left, top, right, bottom.


def html_report(found: dict[str, Any]) -> str:
    """The whole page of a benchmark; everything of it is escaped."""
    return render("bench", b=found, plot=_plot(found))


def _plot(found: dict[str, Any]) -> dict[str, Any]:
    """Coordinates: operations for each byte read, and operations a second, both by powers of 10."""
    bandwidth, rate = found["machine"]["bandwidth"], found["machine"]["rate"]
    points = [
        (row["cost"]["flops"] / row["cost"]["bytes"], row["flops_per_second"], row)
        for row in found["rows"]
    ]
    across = _Axis.over([x for x, _, _ in points] + [rate / bandwidth], _LEFT, _WIDTH - _RIGHT)
    upwards = _Axis.over([y for _, y, _ in points] + [rate], _HEIGHT - _BOTTOM, _TOP)
    edges = (across.low, rate / bandwidth, across.high)
    roof = [(x, min(rate, bandwidth * x)) for x in edges]
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "top": _TOP,
        "floor": _HEIGHT - _BOTTOM,
        "roof": [(across.at(x), upwards.at(y)) for x, y in roof],
        "points": _labelled([(across.at(x), upwards.at(y), row) for x, y, row in points]),
        "across": [(across.at(x), f"{x:g}") for x in across.ticks()],
        "upwards": [(upwards.at(y), f"{y / 1e9:g}") for y in upwards.ticks()],
    }


def _labelled(points: list[tuple[float, float, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Points with the places of their labels, which cover neither points nor each other."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in points]
    found = []
    for x, y, row in points:
        label = f"{row['batch']}\u00d7{row['length']}"
        boxes = _places(x, y, _LETTER * len(label))
        free = (one for one in boxes if not any(_overlap(one, other) for other in taken))
        box = next(free, boxes[0])
        taken.append(box)
        leader = _nearest(x, y, box)
        far = math.dist((x, y), leader) > _NEAR
        found.append(
            {
                **{"x": x, "y": y, "row": row, "label": label, "leader": leader if far else None},
                **{"label_x": round(box[0], 1), "label_y": round(box[3] - 3, 1)},
            }
        )
    return found


def _places(x: float, y: float, width: float) -> list[_Box]:
    """Boxes for a label around a point, in the plot, the nearest first."""
    boxes = [
        (left, middle - _LINE / 2, left + width, middle + _LINE / 2)
        for away in range(_NEAR, 200, 8)
        for left, middle in (
            *((x + away, y), (x - away - width, y)),
            *((x - width / 2, y - away - _LINE / 2), (x - width / 2, y + away + _LINE / 2)),
            *((x + away, y - away), (x + away, y + away)),
            *((x - away - width, y - away), (x - away - width, y + away)),
        )
    ]
    inside = [
        box
        for box in boxes
        if box[0] >= _LEFT
        and box[1] >= _TOP
        and box[2] <= _WIDTH - _RIGHT
        and box[3] <= _HEIGHT - _BOTTOM
    ]
    return inside or boxes


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _nearest(x: float, y: float, box: _Box) -> tuple[float, float]:
    """The point of a box that is nearest to another point."""
    return round(min(max(x, box[0]), box[2]), 1), round(min(max(y, box[1]), box[3]), 1)


class _Axis:
    """A logarithmic axis over whole powers of ten, from one pixel to another."""

    def __init__(self, low: int, high: int, start: float, end: float):
        self._low, self._high, self._start, self._end = low, high, start, end

    @classmethod
    def over(cls, values: list[float], start: float, end: float) -> _Axis:
        low = math.floor(math.log10(min(values)))
        return cls(low, max(low + 1, math.ceil(math.log10(max(values)))), start, end)

    @property
    def low(self) -> float:
        return 10.0**self._low

    @property
    def high(self) -> float:
        return 10.0**self._high

    def at(self, value: float) -> float:
        share = (math.log10(value) - self._low) / (self._high - self._low)
        return round(self._start + min(1.0, max(0.0, share)) * (self._end - self._start), 1)

    def ticks(self) -> list[float]:
        return [10.0**power for power in range(self._low, self._high + 1)]
