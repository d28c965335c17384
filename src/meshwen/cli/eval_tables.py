# SPDX-License-Identifier: Apache-2.0
"""What `meshwen eval` prints of runs and comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from meshwen.cli.console import harmless, note, output_console, say, write
from meshwen.cli.tables import PlainTable

if TYPE_CHECKING:
    from meshwen.evals.compare import Comparison
    from meshwen.evals.run_file import Key, Record, RunFile

_LISTED = 10  # problems with other tokens, and reasons of failures; --json or run files have all


def print_summary(found: Mapping[str, Any], run: RunFile) -> None:
    """One run, in a few lines."""
    low, high = found["interval"]
    write(
        f"{run.settings['prompt_style']}: {found['correct']} of {found['answers']} right, "
        f"{found['accuracy']:.1%} (95% interval {low:.1%} to {high:.1%})"
    )
    if "any_correct" in found:
        write(
            f"of {found['problems']} problems, {found['any_correct']} with a right answer, "
            f"{found['majority_correct']} by majority"
        )
    write(f"prompt style {run.settings['prompt_style']}: {run.settings['prompt_style_why']}")
    rest = f"{found['tokens']} tokens, {found['truncated']} answers cut off, {found['seconds']} s"
    if found["prompt_tokens"]:
        rest += f", {found['cached_tokens']} of {found['prompt_tokens']} prompt tokens cached"
    before = found["answers_from_before"]
    write(rest + f", {before} answers from before" * bool(before))
    _print_failed(run, "could not be asked, counted as wrong")
    note(f"every answer is in {run.path}")


def print_meshes(
    results: Sequence[tuple[RunFile, Mapping[str, Any]]], compared: Sequence[Comparison]
) -> None:
    """The runs of several meshes, each against the first."""
    settings = results[0][0].settings
    weights = settings["quantization"] or settings["dtype"]
    table = PlainTable(
        f"{settings['model']}, {weights}, {settings['numerics']}: {compared[0].answers} answers",
        *("mesh", ">right", ">accuracy", ">95% interval", ">identical", ">flips", ">p", ">s"),
    )
    for (run, found), against in zip(results, compared, strict=True):
        low, high = found["interval"]
        table.add_row(
            run.settings["mesh"],
            str(found["correct"]),
            f"{found['accuracy']:.1%}",
            f"{low:.1%} to {high:.1%}",
            str(against.identical),
            f"-{len(against.only_first)} +{len(against.only_second)}",
            "" if against.p is None else f"{against.p:.3g}",
            str(found["seconds"]),
        )
    table.print(output_console())
    for run, _ in results:
        _print_failed(run, f"could not be asked on {run.settings['mesh']}, counted as wrong")


def print_comparison(found: Comparison, runs: tuple[RunFile, RunFile]) -> None:
    """Two runs, and the texts of the answers that one alone has right."""
    from meshwen.evals.compare import alone_text, settings_apart

    console = output_console()
    table = PlainTable(f"{found.answers} answers", "run", ">right", ">accuracy", ">only right")
    for run, right, alone in zip(
        runs, found.correct, (found.only_first, found.only_second), strict=True
    ):
        table.add_row(str(run.path), str(right), f"{right / found.answers:.1%}", str(len(alone)))
    table.print(console)
    if any(found.alone):
        say(console, alone_text(found, runs))
    for run in runs:
        _print_failed(run, f"could not be asked in {run.path}, counted as wrong")
    p = "" if found.p is None else f"McNemar's exact p: {found.p:.3g}; "
    say(console, f"{p}identical answers: {found.identical} of {found.answers}")
    for name, (one, other) in settings_apart(runs).items():
        say(console, f"{name}: {one} and {other}")
    if found.parted:
        problem, _, token = min(found.parted, key=lambda one: one[2])
        places = ", ".join(f"{one[0]} from {one[2]}" for one in found.parted[:_LISTED])
        more = ", ..." * (len(found.parted) > _LISTED)
        say(
            console,
            f"other tokens in problem {places}{more}; the earliest from {token} on, in problem "
            f"{problem}",
        )
    parted = {(problem, sample): token for problem, sample, token in found.parted}
    for key in found.flips:
        sample = f", sample {key[1]}" if found.p is None else ""
        how = f"other tokens from {parted[key]} on" if key in parted else "graded otherwise"
        side_by_side = PlainTable(f"problem {key[0]}{sample}, {how}", *_verdicts(runs, key))
        side_by_side.add_row(*(_answer_text(run.records[key]) for run in runs))
        side_by_side.print(console)


def _verdicts(runs: tuple[RunFile, RunFile], key: Key) -> list[str]:
    records = [run.records[key] for run in runs]
    return [
        f"~{run.path}: {'right' if one['correct'] else 'wrong'}, {one['extracted']}"
        for run, one in zip(runs, records, strict=True)
    ]


def _print_failed(run: RunFile, label: str) -> None:
    """The problems that could not be asked, and those of each reason."""
    reasons: dict[str, set[int]] = {}
    for (problem, _), one in sorted(run.records.items()):
        if one["finish_reason"] == "error":
            # Without the number, which would tell equal reasons apart.
            reason = _answer_text(one).replace(f"problem {problem}", "the prompt", 1)
            reasons.setdefault(reason, set()).add(problem)
    if not reasons:
        return
    write(harmless(f"{label}: {_listed(set().union(*reasons.values()))}"))
    for reason, problems in list(reasons.items())[:_LISTED]:
        write(harmless(f"  {_listed(problems)}: {reason}"))
    if len(reasons) > _LISTED:
        write("  ...")


def _listed(problems: set[int]) -> str:
    return ", ".join(map(str, sorted(problems)))


def _answer_text(one: Record) -> str:
    """An answer's text, or why there is none."""
    return str(one["error"] if one["finish_reason"] == "error" else one["text"].strip())
