# SPDX-License-Identifier: Apache-2.0
"""`meshwen inspect`: a model's tensors, and how they lie on a mesh. Runs nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from meshwen.cli import options
from meshwen.cli.console import note, output_console, progress_bar, write
from meshwen.cli.option_groups import with_groups
from meshwen.common.choices import LoadFormat
from meshwen.common.json_files import to_json
from meshwen.engine.options import EngineOptions
from meshwen.errors import MeshwenError
from meshwen.models.presets import PRESETS

if TYPE_CHECKING:
    from meshwen.checkpoints import Checkpoint
    from meshwen.cli.inspect_report import TensorRow


@with_groups(engine=options.engine_options(*options.LOADING))
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model folder, a .gguf file, a hub id or demo; or a published size, which needs "
            f"no files: {', '.join(PRESETS)}.",
            show_default=False,
        ),
    ],
    *,
    engine: EngineOptions,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--filter",
            metavar="GLOB",
            help="Only tensors whose names match, for example '*.layers.0.*'.",
            show_default=False,
        ),
    ] = None,
    stats: Annotated[
        bool,
        typer.Option(
            "--stats",
            help="Read the tensors: minimum, maximum, mean, and counts of NaN and infinity.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: options.Debug = False,
) -> None:
    """Show a model's config, its tensors, and how they lie on a mesh.

    Nothing runs, so any mesh can be inspected on any machine. Of a hub id only the config is
    downloaded, unless --stats or --load-format asks for weights. Exit status 2: the checkpoint's
    tensors do not fit its config.
    """
    from meshwen.checkpoints import name_kind, open_checkpoint
    from meshwen.cli.inspect_report import inspection, tensor_rows
    from meshwen.cli.inspect_tables import print_inspection
    from meshwen.parallel.mesh import MeshSpec
    from meshwen.weights.loading import check_tensors

    abstract_mesh = MeshSpec.parse(str(engine.mesh)).abstract()  # No back end starts.
    opened_as = _load_format(model, engine.load_format, stats)
    with open_checkpoint(model, load_format=opened_as, revision=engine.revision) as checkpoint:
        if opened_as != engine.load_format and name_kind(model) == "hub":
            note(
                f"{model}: its config alone; --stats, or --load-format safetensors, downloads the "
                "weights and looks at them too"
            )
        for text in checkpoint.notes:
            note(text)
        parallel = engine.parallel_model(checkpoint.config, abstract_mesh)
        rows = tensor_rows(parallel, checkpoint.tensors, "*" if pattern is None else pattern)
        if not rows:
            raise MeshwenError(
                f"no tensor of {model} has a name like {pattern!r}: leave out --filter to see all"
            )
        if stats:
            rows = _with_stats(rows, model, checkpoint)
        report = inspection(parallel, checkpoint, rows)
        if as_json:
            write(to_json(report))
        else:
            fold = pattern is None and not stats
            print_inspection(report, rows, output_console(), fold=fold)
        if checkpoint.format is not None:
            check_tensors(checkpoint, parallel.weights)


def _load_format(model: str, load_format: LoadFormat, stats: bool) -> LoadFormat:
    """What to open: a preset has no weights; a hub id's are downloaded for some options."""
    from meshwen.checkpoints import name_kind

    kind = name_kind(model)
    config_alone = kind == "preset" or (kind == "hub" and not stats)
    if config_alone and load_format == "auto":
        return "dummy"
    return load_format


def _with_stats(rows: list[TensorRow], model: str, checkpoint: Checkpoint) -> list[TensorRow]:
    from meshwen.cli.inspect_report import tensor_stats

    if checkpoint.format is None:
        raise MeshwenError(
            f"--stats reads weights, and {model} was opened without any: leave out one of --stats "
            "and --load-format dummy, or name a checkpoint"
        )
    found = []
    with progress_bar("reading tensors") as progress:
        for done, row in enumerate(rows):
            progress(done, len(rows))
            source = checkpoint.tensors.get(row.name)
            found.append(row if source is None else replace(row, stats=tensor_stats(source)))
    return found
