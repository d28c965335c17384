# SPDX-License-Identifier: Apache-2.0
"""Runs, and what differs between them, as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meshwen.evals.compare import Comparison, alone_text, settings_apart, settings_of
from meshwen.evals.gsm8k import summary
from meshwen.evals.run_file import Key, Record, RunFile
from meshwen.evals.styles import prompt_style
from meshwen.pages import render

# What a setting is about; the others are options.
_ABOUT = {
    **dict.fromkeys(("model", "weights_sha256", "config_sha256", "revision"), "model"),
    **dict.fromkeys(("meshwen", "jax"), "version"),
    **dict.fromkeys(("mesh", "products"), "machine"),
    **dict.fromkeys(("data_sha256", "train_sha256"), "data"),
}


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
    shown = [{"answer": first.records[key]} for key in sorted(first.records)]
    answers = [one | {"kinds": _kinds(one["answer"])} for one in shown]
    return render(
        "eval",
        script="filter.js",
        first=first,
        source=prompt_style(first.settings["prompt_style"]).source,
        rows=rows,
        sampled="any_correct" in rows[0]["found"],
        differences=[
            {
                "run": run,
                "flips": _flips(first, run, one),
                "against": one,
                "alone": alone_text(one, (first, run)) if any(one.alone) else "",
            }
            for run, one in zip(runs[1:], compared, strict=True)
        ],
        # One value where all agree.
        settings={
            name: values[:1] if values.count(values[0]) == len(values) else values
            for name, values in settings_of(runs).items()
        },
        settings_apart=_by_subject(settings_apart(runs)),
        answers=answers,
        kinds={
            kind: sum(kind in one["kinds"] for one in answers)
            for kind in ("all", "wrong", "right", "cut off", "failed")
        },
    )


def _by_subject(settings: dict[str, list[Any]]) -> dict[str, dict[str, list[Any]]]:
    """Settings by what they are about."""
    found: dict[str, dict[str, list[Any]]] = {}
    for subject in ("model", "data", "option", "machine", "version"):
        own = {name: v for name, v in settings.items() if _ABOUT.get(name, "option") == subject}
        found |= {subject: own} if own else {}
    return found


def _kinds(answer: Record) -> list[str]:
    """What an answer may be looked for by."""
    ends = {"length": ["cut off"], "error": ["failed"]}.get(answer["finish_reason"], [])
    return ["all", "right" if answer["correct"] else "wrong", *ends]


def _flips(first: RunFile, second: RunFile, compared: Comparison) -> list[dict[str, Any]]:
    """The answers that one run alone has right, side by side, each with its run."""
    parted: dict[Key, int] = {(problem, sample): at for problem, sample, at in compared.parted}
    return [
        {"pair": [(run, run.records[key]) for run in (first, second)], "token": parted.get(key)}
        for key in sorted(compared.flips)
    ]
