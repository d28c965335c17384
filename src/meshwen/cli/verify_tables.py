# SPDX-License-Identifier: Apache-2.0
"""What `meshwen verify` prints for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from meshwen.cli.console import say
from meshwen.cli.tables import PlainTable
from meshwen.common.units import bytes_text, difference_text
from meshwen.verify.picture import bytes_range, collectives_by_mesh, greedy_text, strip, worst

_COLUMNS = (
    *("mesh", ">n", ">weights", ">cache", ">max diff", ">relative", ">mean KL"),
    *(">greedy", ">proven", "bits", ">sent", ">s"),
)


def print_certificate(found: dict[str, Any], console: Console) -> None:
    """Prints tables, pictures and the verdict."""
    prompts, steps = len(found["prompts"]), len(found["tokens"][0])
    kept = found["dtype"] + (f", {found['quantization']}" if found["quantization"] else "")
    say(
        console,
        f"{found['model']} in {kept}: {prompts} prompts, {steps} tokens after each, "
        f"against {found['meshes'][0]}",
        "bold",
    )
    for numerics in found["numerics"]:
        rows = [row for row in found["rows"] if row["numerics"] == numerics]
        _table(numerics, rows).print(console)
        _print_divergence(rows, console)
        _print_collectives(rows, found["layers"], console)
    _print_cache(found["rows"], console)
    _print_self_test(found["self_test"], console)
    _print_golden(found["golden"], console)
    _print_verdict(found, console)


def _table(numerics: str, rows: list[dict[str, Any]]) -> PlainTable:
    title = (
        f"{numerics}, matmuls by {rows[0]['products']} "
        "(n devices; on each: weights, KV cache, bytes sent for a token)"
    )
    table = PlainTable(title, *_COLUMNS)
    for row in rows:
        table.add_row(*_cells(row), style="red" if row["broken"] else "")
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    cached = row["cached"]
    return [
        row["mesh"],
        str(row["devices"]),
        bytes_range(row["weight_bytes"], bytes_text),
        bytes_range(row["cache_bytes"], bytes_text),
        difference_text(worst(row, "max_abs")),
        difference_text(worst(row, "max_relative")),
        difference_text(worst(row, "mean_kl")),
        f"{cached['agree']}/{cached['positions']}",
        f"{cached['proven']}/{cached['positions']}",
        "equal" if row["bits_equal"] else "differ",
        bytes_text(row["sent_bytes_per_token"]),
        f"{sum(row['seconds']):.1f}",
    ]


def _print_divergence(rows: list[dict[str, Any]], console: Console) -> None:
    """A strip a mesh: a character an operation."""
    names = [name.rpartition(":")[2] for name in rows[0]["operations"][:-1]]
    operations = ", ".join(dict.fromkeys(names))
    say(console, f"\n{operations} (· same bits, ▁ to █: 1e-8 to 1 apart)")
    width = max(len(row["mesh"]) for row in rows)
    for row in rows:
        where = row["first_divergence"] or "nowhere"
        line = f"{row['mesh']:<{width}}  {strip(row)}  first divergence: {where}"
        if row["cached"]["first_divergence"] is not None:
            line += f"; greedy tokens {greedy_text(row)}"
        say(console, line)


def _print_collectives(rows: list[dict[str, Any]], layers: int, console: Console) -> None:
    say(console, "\ncollectives of a decode step")
    for meshes, text in collectives_by_mesh(rows, layers).items():
        say(console, f"{meshes}: {text}")


def _print_cache(rows: list[dict[str, Any]], console: Console) -> None:
    """How far logits through the cache are from those of whole sequences, on each mesh."""
    say(console, "\nlogits through the cache, against those of whole sequences on the same mesh")
    for numerics in dict.fromkeys(row["numerics"] for row in rows):
        own = [row["cached_against_whole"] for row in rows if row["numerics"] == numerics]
        equal = all(difference["bits_equal"] for difference in own)
        largest = max(difference["max_relative"] for difference in own)
        text = "bits equal" if equal else f"at most {largest:.1e} of the largest logit apart"
        say(console, f"{numerics}: {text} on {len(own)} meshes")


def _print_self_test(self_test: dict[str, list[dict[str, Any]]], console: Console) -> None:
    for key, faults in self_test.items():
        say(console, f"\nself-test on {key}", "bold")
        for fault in faults:
            if fault["caught"]:
                passes = "" if fault["breaks"] else "; by its logits alone it would pass"
                say(console, f"found at {fault['put_at']}: {fault['fault']}{passes}")
                continue
            found = fault["found_at"] or "nowhere"
            text = f"NOT FOUND at {fault['put_at']}, but {found}: {fault['fault']}"
            say(console, text, "red")


def _print_golden(comparisons: list[dict[str, Any]], console: Console) -> None:
    for golden in comparisons:
        binding = "" if golden["binding"] else "; none need be, as weights are rounded"
        text = (
            f"\n{golden['numerics']} against {golden['source']}: {golden['equal']} of "
            f"{golden['prompts']} prompts equal, {golden['tokens']} tokens in all{binding}"
        )
        say(console, text)
        for line in golden["differences"]:
            say(console, line)


def _print_verdict(found: dict[str, Any], console: Console) -> None:
    if found["ok"]:
        say(console, "\nevery promise was kept", "bold green")
        return
    say(console, "\nbroken", "bold red")
    for promise in found["broken"]:
        say(console, f"- {promise}", "red")
