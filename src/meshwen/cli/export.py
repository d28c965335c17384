# SPDX-License-Identifier: Apache-2.0
"""`meshwen export`: a program of a model, for other compilers and for plain JAX."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshwen.cli import options
from meshwen.cli.console import note, progress_bar
from meshwen.cli.load import opened
from meshwen.cli.option_groups import with_groups
from meshwen.common.choices import OUTPUTS, PLATFORMS, PROFILES, PROGRAMS
from meshwen.common.option_fields import Option
from meshwen.common.units import bytes_text
from meshwen.engine.options import EngineOptions
from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    from meshwen.checkpoints import Checkpoint
    from meshwen.handoff.plain import Plain
    from meshwen.models.parallel_model import ParallelModel


_MODEL_HELP = options.MODEL_HELP.replace("dummy also", "dummy, or --no-golden, also")


@with_groups(engine=options.engine_options(*options.LOADING))
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)],
    *,
    engine: EngineOptions,
    program: Annotated[
        str,
        options.declared(
            Option(
                "logits: of whole sequences. prefill: prompts into an empty cache. decode: one "
                "token of each sequence.",
                str,
                choices=PROGRAMS,
            ),
            "--program",
        ),
    ] = "decode",
    profile: Annotated[
        str,
        options.declared(
            Option(
                "native: what runs here, without CPU kernels. portable: few operations, for "
                "compilers that know few; fast numerics alone.",
                str,
                choices=PROFILES,
            ),
            "--profile",
        ),
    ] = "native",
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FOLDER", help="Where to write; it must not exist."),
    ] = ...,  # type: ignore[assignment]
    batch: Annotated[int, options.declared(Option("Sequences.", int, least=1), "--batch")] = 1,
    tokens: Annotated[
        int | None,
        options.declared(
            Option("Tokens of a sequence, of prefill and logits. Default: 16.", int, least=1),
            "--tokens",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        int | None,
        options.declared(
            Option("Positions of the cache, of prefill and decode. Default: 128.", int, least=1),
            "--length",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str,
        options.declared(
            Option(
                "What prefill and decode give: logits, or the likeliest tokens.",
                str,
                choices=OUTPUTS,
            ),
            "--output",
        ),
    ] = "logits",
    composites: Annotated[
        bool,
        typer.Option(
            "--composites",
            help="Norms and attention as the StableHLO composites tenstorrent.rms_norm and "
            "tenstorrent.scaled_dot_product_attention; portable profile.",
        ),
    ] = False,
    weights: Annotated[
        bool,
        typer.Option("--weights", help="Write the weights too, as they lie on the devices."),
    ] = False,
    no_golden: Annotated[
        bool,
        typer.Option(
            "--no-golden",
            help="Run no step to write its arguments and results. Then no weight is read and no "
            "device is needed, so any mesh and any size will do.",
        ),
    ] = False,
    platform: Annotated[
        str | None,
        options.declared(
            Option("What to lower for; needs --no-golden. Default: cpu.", str, choices=PLATFORMS),
            "--platform",
            show_default=False,
        ),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Write a program of a model to a folder that runs with plain JAX.

    The folder has the program for jax.export and as StableHLO text, the arguments and results of
    one step, a manifest with everything that a caller has to know, and run.py, which runs the step
    (with --weights) and compares.
    """
    from meshwen.handoff.exporting import check_folder, export
    from meshwen.handoff.programs import parallel_model
    from meshwen.handoff.programs import program as make_program
    from meshwen.parallel.mesh import MeshSpec

    check_folder(out)
    if no_golden and weights:
        raise MeshwenError("--weights are read to run a step: leave out --no-golden")
    if platform is not None and not no_golden:
        raise MeshwenError("--platform is for a program that is not run here: add --no-golden")
    # Of what is not run, the config is enough.
    read = replace(engine, load_format="dummy") if no_golden else engine
    with opened(model, read) as checkpoint:
        parallel = parallel_model(
            checkpoint.config,
            MeshSpec.parse(str(engine.mesh)).abstract() if no_golden else engine.make_mesh(),
            dtype=engine.dtype,
            numerics=engine.numerics,
            quantization=engine.quantization,
        )
        chosen = make_program(
            program,
            parallel,
            profile=profile,
            batch=batch,
            tokens=tokens,
            length=length,
            output=output,
            composites=composites,
        )
        params = None if no_golden else _weights(checkpoint, parallel)
    folder = export(chosen, out, params, weights=weights, platform=platform, progress=note)
    nbytes = sum(file.stat().st_size for file in folder.iterdir())
    note(f"{folder}: the {chosen.name} program, {chosen.profile} profile, {bytes_text(nbytes)}")
    if chosen.lacks_kernels:
        note("CPU kernels cannot be exported: XLA multiplies and attends in this program")
    if params is not None and checkpoint.format is None:
        note("weights: random, as --load-format dummy asks")


def _weights(checkpoint: Checkpoint, parallel: ParallelModel) -> Plain:
    from meshwen.handoff.weights import load_weights

    with progress_bar("loading weights") as progress:
        return load_weights(parallel, checkpoint, progress)
