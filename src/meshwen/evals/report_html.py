# SPDX-License-Identifier: Apache-2.0
"""Runs, and what differs between them, as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meshwen.evals.compare import Comparison, settings_of
from meshwen.evals.gsm8k import summary
from meshwen.evals.run_file import Key, RunFile
from meshwen.evals.styles import prompt_style
from meshwen.pages import render


def html_report(runs: Sequence[RunFile], compared: Sequence[Comparison]) -> str:
    """The whole page; everything of the runs is escaped.

    Args:
        runs: at least one.
        compared: the first run with each of the others.
    """
    first = runs[0]
    rows: list[dict[str, Any]] = [
        {"run": run, "found": summary(run.records.values()), "against": against}
        for run, against in zip(runs, [None, *compared], strict=True)
    ]
    return render(
        "eval",
        first=first,
        source=prompt_style(first.settings["prompt_style"]).source,
        rows=rows,
        sampled="any_correct" in rows[0]["found"],
        differences=[
            {"run": run, "flips": _flips(first, run, one), "against": one}
            for run, one in zip(runs[1:], compared, strict=True)
        ],
        # One value where all agree.
        settings={
            name: values[:1] if values.count(values[0]) == len(values) else values
            for name, values in settings_of(runs).items()
        },
        answers=[first.records[key] for key in sorted(first.records)],
    )


def _flips(first: RunFile, second: RunFile, compared: Comparison) -> list[dict[str, Any]]:
    """The answers that one run alone has right, side by side, each with its run."""
    parted: dict[Key, int] = {(problem, sample): at for problem, sample, at in compared.parted}
    return [
        {"pair": [(run, run.records[key]) for run in (first, second)], "token": parted.get(key)}
        for key in sorted(compared.flips)
    ]
