# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """A number of bytes in decimal units with three digits: 15.2 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    if unit == "B":
        return f"{count:.0f} B"
    return f"{count:.{max(0, 2 - len(str(int(count))) + 1)}f} {unit}"


def count_text(count: int) -> str:
    """A number of parameters with three digits: 7.62 B (10^9), 494 M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def percent_more(found: float, ideal: float) -> float:
    """By how many percent something is more than the ideal, with two decimals."""
    return round((found / ideal - 1) * 100, 2)


def difference_text(value: float) -> str:
    """A difference with two digits, 1.2e-06; 0 only where there is none."""
    return "0" if value == 0 else f"{value:.1e}"
