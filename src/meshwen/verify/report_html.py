# SPDX-License-Identifier: Apache-2.0
"""A certificate as one HTML file that needs nothing else: tables, a plot of layers, the heads."""

from __future__ import annotations

from typing import Any

from meshwen.common.units import bytes_text
from meshwen.pages import render
from meshwen.verify.picture import (
    LARGEST,
    SMALLEST,
    bytes_range,
    collectives_by_mesh,
    greedy_text,
    height,
    worst,
)

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 900, 260, 52, 40
_MOST_DEVICES = 64


def html_report(certificate: dict[str, Any]) -> str:
    """The whole page; everything of the certificate's is escaped."""
    sections = []
    for numerics in certificate["numerics"]:
        rows = [row for row in certificate["rows"] if row["numerics"] == numerics]
        shown = [_shown(row) for row in rows]
        sections.append(
            {
                "numerics": numerics,
                "products": rows[0]["products"],
                "rows": shown,
                "collectives": collectives_by_mesh(rows, certificate["layers"]),
                "plot": _plot(rows),
            }
        )
    steps = len(certificate["tokens"][0])
    return render("verify", c=certificate, sections=sections, steps=steps)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what the page writes of it."""
    return row | {
        "weights": bytes_range(row["weight_bytes"], bytes_text),
        "cache": bytes_range(row["cache_bytes"], bytes_text),
        "max_abs": worst(row, "max_abs"),
        "mean_abs": worst(row, "mean_abs"),
        "max_relative": worst(row, "max_relative"),
        "mean_kl": worst(row, "mean_kl"),
        "greedy": greedy_text(row),
        "devices_heads": _devices_heads(row["heads"]),
        "hidden_devices": max(0, len(row["heads"]["query"]) - _MOST_DEVICES),
    }


def _devices_heads(heads: dict[str, Any]) -> list[list[tuple[int | None, list[int | None]]]]:
    """Of each device, each key/value head with its query heads; None is a padded head."""
    pairs = zip(heads["key_value"], heads["query"], strict=True)
    return [list(zip(kv, query, strict=True)) for kv, query in pairs][:_MOST_DEVICES]


def _plot(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Coordinates of the plot: a line a mesh, relative difference over the operations."""
    operations = rows[0]["operations"][:-1]
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
                "mesh": row["mesh"],
                "points": [
                    (round(_LEFT + i * step, 1), round(top + drawn * (1 - height(value)), 1))
                    for i, value in enumerate(row["divergence"])
                ],
            }
            for row in rows
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
