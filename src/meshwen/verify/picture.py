# SPDX-License-Identifier: Apache-2.0
"""Small pictures of a certificate's numbers: one character, or one pixel height, a magnitude."""

from __future__ import annotations

import math
from typing import Any

_LEVELS = "▁▂▃▄▅▆▇█"
SMALLEST, LARGEST = -8, 0  # Powers of ten that the pictures span.


def height(relative: float) -> float:
    """A relative difference as a height from 0 (1e-8 or less) to 1 (1 or more, or NaN)."""
    if relative == 0:
        return 0.0
    if not math.isfinite(relative):
        return 1.0
    share = (math.log10(relative) - SMALLEST) / (LARGEST - SMALLEST)
    return min(1.0, max(0.0, share))


def strip(row: dict[str, Any]) -> str:
    """One character an operation but the logits: · the same bits, ▁ to █ 1e-8 to 1 apart."""
    pairs = zip(row["operations_equal"], row["divergence"], strict=False)
    return "".join("·" if equal else level(relative) for equal, relative in pairs)


def level(relative: float) -> str:
    """A relative difference as one character, ▁ to █ for 1e-8 to 1."""
    return _LEVELS[min(len(_LEVELS) - 1, int(height(relative) * len(_LEVELS)))]


def bytes_range(least_and_most: tuple[int, int], text: Any) -> str:
    """Bytes on the devices: one number where all hold the same."""
    least, most = least_and_most
    return str(text(most) if least == most else f"{text(least)} to {text(most)}")


def collectives_by_mesh(rows: list[dict[str, Any]], layers: int) -> dict[str, str]:
    """The collectives of a decode step, each with the meshes, on one line, that have them."""
    alike: dict[str, list[str]] = {}
    for row in rows:
        alike.setdefault(", ".join(_collectives(row, layers)), []).append(row["mesh"])
    return {" ".join(meshes): text for text, meshes in alike.items()}


def _collectives(row: dict[str, Any], layers: int) -> list[str]:
    """`2 all-reduce f32 a layer`, and what there is beside the layers."""
    lines = []
    for found in row["collectives"]:
        kind = f"{found['kind']} {found['dtype']}"
        count, rest = divmod(found["count"], layers) if found["in_layer"] else (0, found["count"])
        if count:
            lines.append(f"{count} {kind} a layer")
        if rest:
            lines.append(f"{rest} {kind}")
    return lines or ["none"]


def greedy_text(row: dict[str, Any]) -> str:
    """Tokens equal, and where they first are not."""
    cached = row["cached"]
    text = f"{cached['agree']}/{cached['positions']}"
    if cached["first_divergence"] is None:
        return text
    prompt, step = cached["first_divergence"]
    return f"{text}, first in prompt {prompt} at token {step}"


def worst(row: dict[str, Any], field: str) -> float:
    """The larger of both kinds of logits."""
    return float(max(row["whole"][field], row["cached"][field]))
