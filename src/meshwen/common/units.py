# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them."""

from __future__ import annotations

import re
from typing import Any

from meshwen.common.arguments import brief, number
from meshwen.errors import MeshwenError

_BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_text(count: float) -> str:
    """A number of bytes in decimal units with three digits: 15.2 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    if unit == "B":
        return f"{count:.0f} B"
    return f"{count:.{max(0, 2 - len(str(int(count))) + 1)}f} {unit}"


def bytes_number(name: str, value: int | str) -> int:
    """A number of bytes, which may be text such as "5GB" or "200MiB", as transformers takes it.

    Raises:
        MeshwenError: it is neither, or below 1; `name` says whose it is.
    """
    found = value
    if isinstance(value, str) and (match := re.fullmatch(r"(\d{1,18}) *([KMG]I?B)", value.upper())):
        found = int(match[1]) * _BYTES[match[2]]
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise MeshwenError(
            f'{name} must be a number of bytes, or text such as "5GB", not {brief(value)}'
        )
    return found


def bytes_or_share(name: str, value: Any) -> int | float:
    """An amount of memory: a number of bytes, or a share of what is free.

    Args:
        name: what to call it in an error.
        value: an int of bytes, a float above 0 and at most 1, or text such as "4GB", "50%", "0.5".

    Returns:
        An int or a float.

    Raises:
        MeshwenError: it is none of these.
    """
    try:
        found = _amount(name, value.strip()) if isinstance(value, str) else number(name, value)
    except MeshwenError:
        found = 0
    if not (found >= 1 if isinstance(found, int) else 0 < found <= 1):
        raise MeshwenError(
            f'{name} must be bytes, such as "4GB", or a share of the free memory, such as "50%" or '
            f"0.5, not {brief(value)}"
        )
    return found


def _amount(name: str, text: str) -> int | float:
    if match := re.fullmatch(r"(\d{1,3}(?:\.\d{1,9})?) *%", text):
        return float(match[1]) / 100
    if re.fullmatch(r"\d?\.\d{1,9}", text):
        return float(text)
    return bytes_number(name, text)


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
