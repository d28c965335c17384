# SPDX-License-Identifier: Apache-2.0
"""A certificate as one HTML file that needs nothing else: tables, a plot of layers, the heads."""

from __future__ import annotations

from typing import Any

from meshwen.common.units import bytes_text
from meshwen.pages import render
from meshwen.verify.picture import bytes_range, collectives_by_mesh, greedy_text, worst
from meshwen.verify.plot import divergence_plot

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
                "plot": divergence_plot(
                    rows[0]["operations"][:-1], {row["mesh"]: row["divergence"] for row in rows}
                ),
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
