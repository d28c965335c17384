# SPDX-License-Identifier: Apache-2.0
"""`meshwen verify --activations`: another stack's activations against ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from meshwen.cli.console import note, output_console, say
from meshwen.cli.files import write_text
from meshwen.cli.load import load_model, opened
from meshwen.cli.options import parse_meshes
from meshwen.cli.tables import PlainTable
from meshwen.common.arguments import one_of
from meshwen.common.choices import NUMERICS
from meshwen.common.json_files import to_json
from meshwen.common.units import difference_text
from meshwen.engine.options import EngineOptions
from meshwen.errors import MeshwenError

_COLUMNS = ("", ">PCC", ">max diff", ">relative", ">from its inputs", "operations", "")


def one_run(
    given: Mapping[str, Any],
    loading: EngineOptions,
    meshes: str | None,
    numerics: str | None,
    dtype: Any,
) -> EngineOptions:
    """How to run the model: on one mesh, with one kind of numerics.

    Args:
        given: options that `--activations` has no use for, by their flags; None: not given.
        loading: the other options of loading.
        meshes: as given; None: one device.
        numerics: as given; None: fast.
        dtype: as given; None: float32.

    Raises:
        MeshwenError: something was given that does not go together.
    """
    from meshwen.parallel.distributed import process_count

    if process_count() > 1:
        raise MeshwenError("--activations runs in one process: leave out --coordinator")
    if flags := [flag for flag, value in given.items() if value is not None]:
        raise MeshwenError(
            f"--activations has its own tokens, and compares nothing else: leave out "
            f"{', '.join(flags)}"
        )
    specs = parse_meshes(meshes or "1")
    if len(specs) > 1:
        raise MeshwenError("--activations runs on one mesh: give --meshes one")
    if numerics not in (None, *NUMERICS):
        raise MeshwenError(f"--activations runs once: --numerics must be {one_of(NUMERICS)}")
    return replace(
        loading, mesh=str(specs[0]), numerics=numerics or "fast", dtype=dtype or "float32"
    )


def compare_file(
    model: str,
    file: Path,
    engine: EngineOptions,
    tolerance: float | None,
    pcc: float | None,
    json_file: Path | None,
    html_file: Path | None,
) -> int:
    """Compares a file of activations with a model's, prints and writes what was found.

    Args:
        model: the name of a checkpoint.
        file: the activations.
        engine: how the model is loaded and run.
        tolerance: the largest relative difference; None: by dtype.
        pcc: the least correlation; None: 0.99.
        json_file: where to write the report.
        html_file: where to write it as a page.

    Returns:
        The exit status: 0 where all are within the tolerance, else 1.

    Raises:
        MeshwenError: the file cannot be read, or is not of this model.
    """
    from meshwen.verify.activation_file import read_activations
    from meshwen.verify.activations import PCC, compare_activations
    from meshwen.verify.activations_html import activations_html
    from meshwen.verify.activations_report import activation_report
    from meshwen.verify.operations import modules

    with opened(model, engine) as checkpoint:
        parallel = engine.parallel_model(checkpoint.config)
        theirs = read_activations(file, checkpoint.config, modules(parallel.weights))
        runner = load_model(checkpoint, None, engine).runner
        found = compare_activations(runner, theirs, tolerance, PCC if pcc is None else pcc)
        report = activation_report(checkpoint, runner, file, theirs, found)
    if json_file is not None:
        write_text(json_file, to_json(report, indent=1) + "\n")
        note(f"the report is in {json_file}")
    if html_file is not None:
        write_text(html_file, activations_html(report))
        note(f"the page is in {html_file}")
    print_activations(report, output_console())
    return 0 if report["ok"] else 1


def print_activations(report: dict[str, Any], console: Console) -> None:
    """Prints a row a layer, and the verdict."""
    from meshwen.verify.picture import level

    rows = report["activations"]
    prompts, kept = report["input_ids"], report["dtype"]
    kept += f", {report['quantization']}" if report["quantization"] else ""
    title = (
        f"{report['file']}, {len(prompts)} x {len(prompts[0])} tokens, against {report['model']} "
        f"in {kept} on {report['mesh']}"
    )
    table = PlainTable(title, *_COLUMNS)
    for where, alike in _by_layer(rows).items():
        table.add_row(
            where,
            f"{min(row['from_tokens']['pcc'] for row in alike):.6f}",
            *(
                difference_text(max(row[of][field] for row in alike))
                for of, field in (
                    ("from_tokens", "max_abs"),
                    ("from_tokens", "relative"),
                    ("from_inputs", "relative"),
                )
            ),
            "  ".join(
                "".join(level(row[of]["relative"]) if row[of]["max_abs"] else "·" for row in alike)
                for of in ("from_tokens", "from_inputs")
            ),
            _made(alike),
            style="red" if any(row["outside"] or row["made"] for row in alike) else "",
        )
    table.print(console)
    names = ", ".join(dict.fromkeys(row["name"] for row in rows))
    say(
        console,
        f"\noperations, from the tokens and from their inputs: {names} (· equal, ▁ to █: 1e-8 to 1 "
        "of the largest value)",
    )
    say(console, "\n" + "\n".join(report["verdict"]), "bold green" if report["ok"] else "bold red")


def _made(alike: list[dict[str, Any]]) -> str:
    """Which of a layer's activations have an error of their own, or of what the file lacks."""
    made = [row for row in alike if row["made"]]
    here = [row["name"] for row in made if not row["missing"]]
    before = [row["name"] for row in made if row["missing"]]
    marks = (("made here", here), ("made here or before", before))
    return "; ".join(f"{mark}: {', '.join(names)}" for mark, names in marks if names)


def _by_layer(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Activations by layer; those outside of the layers by name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        where = row["name"] if row["layer"] is None else f"layer {row['layer']}"
        found.setdefault(where, []).append(row)
    return found
