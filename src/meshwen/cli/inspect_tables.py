# SPDX-License-Identifier: Apache-2.0
"""What `meshwen inspect` prints for people: tables of tensors, heads and bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich.console import Console

from meshwen.cli.console import say
from meshwen.cli.inspect_report import TensorRow
from meshwen.cli.tables import PlainTable, print_pairs
from meshwen.common.units import bytes_text, count_text

_SHARED_FIELDS = ("architectures", "hidden_act", "max_window_layers")
_MOST_DEVICES = 64
# A module in a list: its list, its number there, what follows.
_NUMBERED = re.compile(r"(.+?)\.(\d+)\.(.+)")
_Line = tuple[str, ...]


def print_inspection(
    report: dict[str, Any], rows: list[TensorRow], console: Console, *, fold: bool
) -> None:
    """Prints what `inspection` reports; `fold` puts layers that are alike on the same lines."""
    kind = report["format"] or "config only, no weights"
    count = report["parameters"]
    size = f"{count:,} parameters ({count_text(count)})"
    say(console, f"{report['model']} ({kind}): {size}\n", "bold")
    print_pairs(console, _config(report["config"]))
    _tensor_table(rows, fold=fold).print(console)
    if any(row.stats is not None for row in rows):
        _stats_table(rows).print(console)
    _print_heads(report, console)
    _print_bytes(report, console)
    if report["sums"] is not None:
        _print_sums(report["sums"], console)


def _config(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Every field but those that all models share."""
    kinds = [f"{len(list(run))} x {kind}" for kind, run in groupby(config["layer_types"])]
    fields = config | {"layer_types": ", ".join(kinds)}
    return [(key, str(value)) for key, value in fields.items() if key not in _SHARED_FIELDS]


def _tensor_table(rows: list[TensorRow], *, fold: bool) -> PlainTable:
    table = PlainTable(
        "Tensors (axes: each logical axis, and the mesh axes that split it)",
        *("name", ">shape", "file", "~axes", ">per device"),
    )
    has_file = any(row.file_dtype is not None for row in rows)
    lines = _folded(rows, has_file) if fold else [_line(row, has_file) for row in rows]
    for line in lines:
        table.add_row(*line)
    return table


def _folded(rows: list[TensorRow], has_file: bool) -> list[_Line]:
    """Lines of the table, with one block of lines for all layers that are alike."""
    layers: dict[tuple[str, int], list[_Line]] = {}
    before: list[_Line] = []
    after: list[_Line] = []
    for row in rows:
        line = _line(row, has_file)
        if match := _NUMBERED.fullmatch(row.name):
            layer = match[1], int(match[2])
            layers.setdefault(layer, []).append((f" {match[3]}", *line[1:]))
        else:
            (after if layers else before).append(line)
    alike: dict[tuple[str, tuple[_Line, ...]], list[int]] = {}
    for (name, number), lines in layers.items():
        alike.setdefault((name, tuple(lines)), []).append(number)
    blocks = [
        line
        for (name, block), numbers in alike.items()
        for line in ((f"{name}.{{{_ranges(numbers)}}}.",), *block)
    ]
    return [*before, *blocks, *after]


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers, runs shortened: 0-3, 7."""
    runs = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in ends)


def _line(row: TensorRow, has_file: bool) -> _Line:
    in_file = row.quantization or row.file_dtype or ("missing" if has_file else "-")
    if row.shape is None:
        return row.name, _shape(row.file_shape), in_file, "not used"
    if row.file_shape not in (None, row.shape):
        in_file += f" {_shape(row.file_shape)}"
    axes = [
        f"{axis}:{'+'.join(split)}" if split else axis
        for axis, split in zip(row.axes, row.mesh_axes, strict=True)
    ]
    transposed = row.device_axes != row.axes
    shard = row.shard_shape[::-1] if transposed else row.shard_shape
    return row.name, _shape(row.shape), in_file, " ".join(axes), _shape(shard)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "x".join(map(str, shape or ()))


def _stats_table(rows: list[TensorRow]) -> PlainTable:
    table = PlainTable(
        "Values (least, greatest and mean: of the finite ones)",
        *("name", ">min", ">max", ">mean", ">NaN", ">Inf"),
    )
    for row in rows:
        if (stats := row.stats) is not None:
            values = [
                "-" if value is None else f"{value:.4g}"
                for value in (stats.min, stats.max, stats.mean)
            ]
            table.add_row(row.name, *values, str(stats.nan), str(stats.inf))
    return table


def _print_heads(report: dict[str, Any], console: Console) -> None:
    heads = report["head_layout"]
    groups = heads["data_groups"]
    table = PlainTable(
        f"Heads: {heads['query_heads']} query and {heads['key_value_heads']} key/value heads on "
        f"mesh {report['mesh']}"
        + (f", the same in all {groups} data groups" if groups > 1 else ""),
        *(">device", ">kv head", "~query heads (. is padding)"),
    )
    for line in _head_lines(heads):
        table.add_row(*line)
    table.print(console)
    hidden = heads["devices"] - _MOST_DEVICES
    if hidden > 0:
        say(console, f"  ... and {hidden} more devices (--json lists them all)")
    key_value_heads = heads["devices"] * heads["key_value_heads_per_device"]
    say(
        console,
        f"\nOn each device: {_plural(heads['key_value_heads_per_device'], 'kv head')}, each with "
        f"{_plural(heads['query_heads_per_key_value_head'], 'query head')}. With padding and "
        f"copies: {heads['query_heads_with_padding']} query heads for the model's "
        f"{heads['query_heads']} ({_cost(heads['query_cost_percent'])}), {key_value_heads} kv "
        f"heads for {heads['key_value_heads']} ({_cost(heads['key_value_cost_percent'])}).",
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


def _head_lines(heads: dict[str, Any]) -> Iterator[_Line]:
    width = len(str(heads["query_heads"] - 1))
    devices = zip(heads["device_key_value_heads"], heads["device_query_heads"], strict=True)
    for device, (key_value_heads, groups) in enumerate(devices):
        if device >= _MOST_DEVICES:
            return
        for i, (head, group) in enumerate(zip(key_value_heads, groups, strict=True)):
            query_heads = " ".join(_head(one).rjust(width) for one in group)
            yield "" if i else str(device), _head(head), query_heads


def _head(head: int | None) -> str:
    return "." if head is None else str(head)


def _print_bytes(report: dict[str, Any], console: Console) -> None:
    weights, cache = report["weights"], report["kv_cache"]
    matrices = ", of matrices in int8" if report["quantization"] else ""
    table = PlainTable(
        f"Bytes in {report['dtype']}{matrices}",
        *("", ">model", ">per device", ">padding and copies"),
    )
    total = {"all weights": weights}
    for name, part in {**weights["parts"], **total}.items():
        table.add_row(
            name,
            bytes_text(part["model"]),
            bytes_text(part["per_device"]),
            _cost(part["cost_percent"]),
        )
    table.add_row(
        "KV cache, a token",
        bytes_text(cache["model_per_token"]),
        bytes_text(cache["per_device_per_token"]),
        _cost(cache["cost_percent"]),
    )
    table.print(console)
    context = cache["context_length"]
    full = bytes_text(cache["per_device_full_context"])
    say(
        console,
        f"\nAll devices together: {bytes_text(weights['all_devices'])} of weights. "
        f"KV cache of one sequence of {context} tokens: {full} per device.",
    )


def _print_sums(sums: dict[str, Any], console: Console) -> None:
    table = PlainTable(
        "Sums in exact numerics: leaves that no mesh changes, added in one tree",
        *("sum", "~a leaf", ">per device", "~added on each device"),
    )
    for name, one in sums.items():
        if name != "across_devices":
            table.add_row(name, one["leaf"], str(one["leaves_per_device"]), one["device_tree"])
    table.print(console)
    if "+" in sums["across_devices"]:
        say(console, f"\nThen the devices' sums: {sums['across_devices']}.")


def _cost(percent: float) -> str:
    return f"+{percent:.1f}%" if percent >= 0.05 else "+0%"
