# SPDX-License-Identifier: Apache-2.0
"""A benchmark as one HTML file: its tables, and where they lie under the machine's roofline."""

from __future__ import annotations

import math
from typing import Any

from meshwen.pages import render

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 900, 420, 64, 20, 16, 44


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
        "points": [{"x": across.at(x), "y": upwards.at(y), "row": row} for x, y, row in points],
        "across": [(across.at(x), f"{x:g}") for x in across.ticks()],
        "upwards": [(upwards.at(y), f"{y / 1e9:g}") for y in upwards.ticks()],
    }


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
