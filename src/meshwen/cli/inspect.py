# SPDX-License-Identifier: Apache-2.0
"""`meshwen inspect`: a model's tensors, and how they lie on a mesh. Runs nothing."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshwen.cli import options
from meshwen.cli.console import output_console, progress_bar
from meshwen.config import PRESETS, Qwen2Config, preset
from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh

    from meshwen.checkpoints import Checkpoint
    from meshwen.cli.inspect_report import TensorRow


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model folder, a .gguf file, a hub id, demo, or a published size, of which only "
            f"the config is needed: {', '.join(PRESETS)}.",
            show_default=False,
        ),
    ],
    mesh: options.Mesh = "1",
    dtype: options.Dtype = options.DType.BFLOAT16,
    load_format: options.LoadFormatOption = options.LoadFormat.AUTO,
    revision: options.Revision = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--filter",
            metavar="GLOB",
            help="Only the tensors with such a name, e.g. '*.layers.0.*'.",
            show_default=False,
        ),
    ] = None,
    stats: Annotated[
        bool,
        typer.Option(
            "--stats", help="Read the tensors: least, greatest and mean value, NaN and Inf counts."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: options.Debug = False,
) -> None:
    """Show a model's config, its tensors, and how they lie on a mesh.

    Nothing is put on a device, so any mesh can be inspected on any machine. Exit status 2 when the
    checkpoint's tensors do not fit its config.
    """
    from meshwen.cli.inspect_report import inspection, tensor_rows
    from meshwen.cli.inspect_tables import print_inspection
    from meshwen.loading import check_tensors
    from meshwen.parallel.plan import ParallelPlan
    from meshwen.weights import declared_weights

    abstract_mesh = _abstract_mesh(mesh)
    config, opened = _open(model, load_format, revision)
    with opened as checkpoint:
        plan = ParallelPlan(config, abstract_mesh)
        rows = tensor_rows(plan, {} if checkpoint is None else checkpoint.tensors, pattern or "*")
        if not rows:
            raise MeshwenError(f"no tensor of {model} has a name like {pattern!r}")
        if stats:
            rows = _with_stats(rows, model, checkpoint)
        report = inspection(plan, checkpoint, rows, dtype.value)
        if as_json:
            print(json.dumps(report))
        else:
            fold = pattern is None and not stats
            print_inspection(report, rows, output_console(), fold=fold)
        if checkpoint is not None:
            check_tensors(checkpoint, declared_weights(config), plan)


def _abstract_mesh(text: str) -> AbstractMesh:
    """A mesh without devices: all that a layout needs to know, and no back end starts."""
    from jax.sharding import AbstractMesh

    from meshwen.parallel.mesh import MeshSpec

    names, sizes = zip(*MeshSpec.parse(text).axes, strict=True)
    return AbstractMesh(sizes, names)


def _open(
    model: str, load_format: options.LoadFormat, revision: str | None
) -> tuple[Qwen2Config, AbstractContextManager[Checkpoint | None]]:
    """The model's config, and its checkpoint where weights are not made up."""
    from meshwen import demo
    from meshwen.checkpoints import open_checkpoint

    dummy = load_format is options.LoadFormat.DUMMY
    if model.lower() in PRESETS and not Path(model).exists():
        return preset(model), nullcontext()
    if dummy and Path(model).is_dir():
        return Qwen2Config.from_json(model), nullcontext()
    if dummy:
        raise MeshwenError(
            f"--load-format dummy takes a folder with a config.json or one of {', '.join(PRESETS)};"
            f" found {model}"
        )
    path = str(demo.path()) if model == "demo" else model
    checkpoint = open_checkpoint(path, load_format=load_format.value, revision=revision)
    return checkpoint.config, checkpoint


def _with_stats(
    rows: list[TensorRow], model: str, checkpoint: Checkpoint | None
) -> list[TensorRow]:
    from meshwen.cli.inspect_report import tensor_stats

    if checkpoint is None:
        raise MeshwenError(f"--stats reads weights, and {model} was opened without any")
    found = []
    with progress_bar("reading tensors") as progress:
        for done, row in enumerate(rows):
            progress(done, len(rows))
            source = checkpoint.tensors.get(row.name)
            found.append(row if source is None else replace(row, stats=tensor_stats(source)))
    return found
