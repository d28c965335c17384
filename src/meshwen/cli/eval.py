# SPDX-License-Identifier: Apache-2.0
"""`meshwen eval`: scores on word problems, and comparisons of runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshwen.cli import options
from meshwen.cli.console import note, write
from meshwen.cli.eval_options import Asked, asking
from meshwen.cli.eval_run import Evaluation
from meshwen.cli.eval_served import score_server
from meshwen.cli.eval_tables import print_comparison, print_meshes, print_summary
from meshwen.cli.files import check_writable, write_text
from meshwen.cli.option_groups import with_groups
from meshwen.cli.options import parse_meshes
from meshwen.cli.processes import over_processes
from meshwen.common.extras import how_to_install
from meshwen.common.json_files import to_json
from meshwen.common.option_fields import Option
from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    from meshwen.evals.compare import Comparison
    from meshwen.evals.run_file import RunFile

app = typer.Typer()


@app.callback(invoke_without_command=True)
def _eval(context: typer.Context) -> None:
    """Score a model on GSM8K, and compare runs."""
    if context.invoked_subcommand is None:
        write(context.get_help())


_IDENTICAL, _SAME_SCORE = "identical", "same-score"  # What --require may be.

Resume = Annotated[
    bool, typer.Option("--resume", help="Continue a run file that exists; begin one otherwise.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html", metavar="FILE", help="Write a report, one HTML file.", show_default=False
    ),
]
Require = Annotated[
    str | None,
    options.declared(
        Option(
            "Exit status 1 unless all answers are identical token for token, or the scores are the "
            "same.",
            choices=(_IDENTICAL, _SAME_SCORE),
        ),
        "--require",
        show_default=False,
    ),
]


@app.command()
@over_processes
@with_groups(asked=asking("mesh", "numerics", served=True))
def gsm8k(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The run file to write.")],
    *,
    asked: Asked,
    resume: Resume = False,
    html: Html = None,
    as_json: AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Score a model on GSM8K, or on problems in its form; with --url, one that a server has.

    Each answer is written to the run file as soon as it is complete. --resume continues a run that
    was interrupted.
    """
    from meshwen.parallel.distributed import shared

    _check_report(html, [out])
    shared("run files", lambda: _check_file(out, resume))
    if asked.server is None:
        run, found = Evaluation.begin(asked, asked.engine, out, resume).finish()
    else:
        run, found = score_server(asked, asked.server, out, resume)
    if as_json:
        write(to_json(found | {"settings": dict(run.settings)}))
    else:
        print_summary(found, run)
    if html is not None:
        _write_report(html, [run], [])


@app.command()
@over_processes
@with_groups(asked=asking(numerics="exact"))
def meshes(
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="The folder for run files, one a mesh.")
    ],
    meshes: Annotated[
        str,
        typer.Option(
            "--meshes", help="Meshes, with , or ; between them. All are compared with the first."
        ),
    ] = "1x1,1x8,2x4,8x4,1x32",
    *,
    asked: Asked,
    resume: Resume = False,
    require: Require = None,
    html: Html = None,
    as_json: AsJson = False,
    debug: options.Debug = False,
) -> int:
    """Score a model on several meshes, and compare all with the first.

    Without --require, answers must be identical in exact numerics, and scores the same in fast.
    """
    from meshwen.evals.compare import compare as compare_runs
    from meshwen.parallel.distributed import shared
    from meshwen.parallel.mesh import make_mesh

    specs = parse_meshes(meshes)
    make_mesh(max(specs, key=lambda spec: spec.devices))  # Simulated devices enough for all.
    paths = [out / f"{spec}.jsonl" for spec in specs]
    _check_report(html, paths)
    shared("run files", lambda: _check_folder(out, paths, resume))
    # All of them first: a mesh or a file that is refused is not to be heard of after hours.
    begun = [
        Evaluation.begin(asked, replace(asked.engine, mesh=str(spec)), path, resume)
        for spec, path in zip(specs, paths, strict=True)
    ]
    results = [one.finish() for one in begun]
    first = results[0][0]
    compared = [compare_runs(first, run) for run, _ in results]
    if as_json:
        rows = [
            {"mesh": run.settings["mesh"]} | found | {"against_first": asdict(against)}
            for (run, found), against in zip(results, compared, strict=True)
        ]
        write(to_json(rows))
    else:
        print_meshes(results, compared)
    if html is not None:
        _write_report(html, [run for run, _ in results], compared[1:])
    exact = asked.engine.numerics == "exact"
    required = require or (_IDENTICAL if exact else _SAME_SCORE)
    pairs = zip(specs, compared, strict=True)
    if apart := [str(spec) for spec, one in pairs if not _kept(required, one)]:
        note(f"not {required}: {', '.join(apart)}")
    return 1 if apart else 0


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def harness(context: typer.Context) -> None:
    """Run lm-evaluation-harness with --model meshwen.

    It needs the extra lm-eval, and takes the harness's own options:
    meshwen eval harness --model_args pretrained=demo,mesh=1x8 --tasks gsm8k
    """
    try:
        from lm_eval.__main__ import cli_evaluate

        import meshwen.evals.harness  # noqa: F401  (names the model)
    except ImportError as error:
        if {"-h", "--help"} & {*context.args}:
            write(f"{context.get_help()}\n\nIts options are those of lm_eval run; to install it:")
            write(how_to_install("lm-eval"))
            return
        raise MeshwenError(
            f"eval harness needs lm-evaluation-harness ({error}): {how_to_install('lm-eval')}"
        ) from None
    given = any(one.split("=")[0] in ("--batch_size", "-b") for one in context.args)
    # The harness's own default is one at a time.
    batch_size = [] if given else ["--batch_size", "auto"]
    sys.argv = ["lm_eval", "run", "--model", "meshwen", *batch_size, *context.args]
    cli_evaluate()


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A run file.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another, of the same data.")],
    require: Require = None,
    html: Html = None,
    as_json: AsJson = False,
    debug: options.Debug = False,
) -> int:
    """Compare two runs, answer by answer.

    Problems that only one has are counted, and with --require are not allowed.
    """
    from meshwen.evals.compare import compare as compare_runs
    from meshwen.evals.compare import settings_of
    from meshwen.evals.gsm8k import summary
    from meshwen.evals.run_file import RunFile

    check_writable(html, [first, second])
    runs = RunFile.read(first), RunFile.read(second)
    found = compare_runs(*runs)
    if as_json:
        scores = [summary(run.records.values()) | {"path": str(run.path)} for run in runs]
        write(to_json(asdict(found) | {"runs": scores, "settings": settings_of(runs)}))
    else:
        print_comparison(found, runs)
    if html is not None:
        _write_report(html, runs, [found])
    kept = require is None or _kept(require, found)
    if not kept:
        note(f"not {require}")
    return 0 if kept else 1


def _kept(require: str, found: Comparison) -> bool:
    if any(found.alone):
        return False
    return found.all_identical if require == _IDENTICAL else found.same_score


def _check_report(path: Path | None, runs: Sequence[Path]) -> None:
    from meshwen.parallel.distributed import shared

    shared("report", lambda: check_writable(path, runs))


def _write_report(path: Path, runs: Sequence[RunFile], compared: Sequence[Comparison]) -> None:
    from meshwen.evals.report_html import html_report
    from meshwen.parallel.distributed import process_index

    if process_index():
        return
    write_text(path, html_report(runs, compared))
    note(f"the report is in {path}")


def _check_file(path: Path, resume: bool) -> None:
    from meshwen.evals.run_file import check_new

    check_new(path, resume=resume)
    check_writable(path)


def _check_folder(path: Path, files: Sequence[Path], resume: bool) -> None:
    """Makes the folder where there is none; refuses files before any model is read."""
    from meshwen.evals.run_file import check_new

    for file in files:
        check_new(file, resume=resume)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MeshwenError(f"cannot make the folder {path}: {error.strerror}") from None
