# SPDX-License-Identifier: Apache-2.0
"""Two runs on the problems that both have, answer by answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meshwen.errors import MeshwenError
from meshwen.evals.run_file import Key, Record, RunFile
from meshwen.evals.statistics import mcnemar


@dataclass(frozen=True)
class Comparison:
    """What differs between two runs.

    Attributes:
        answers: how many both have.
        correct: how many each has right.
        only_first: (problem, sample) of answers that the first alone has right.
        only_second: those that the second alone has right.
        p: of McNemar's exact test, two-sided; None with several samples a problem, which are not
            independent.
        identical: answers with the same tokens; with the same text where a server has not told
            the tokens of one of them.
        parted: (problem, sample, token) of each other answer, the token, or the character, being
            the first that differs, counted from 0.
        alone: (problem, sample) of answers that are in the first run alone, and in the second; the
            rest says nothing of them.
    """

    answers: int
    correct: tuple[int, int]
    only_first: tuple[Key, ...]
    only_second: tuple[Key, ...]
    p: float | None
    identical: int
    parted: tuple[tuple[int, int, int], ...]
    alone: tuple[tuple[Key, ...], tuple[Key, ...]] = ((), ())

    @property
    def flips(self) -> tuple[Key, ...]:
        """Answers that one run alone has right."""
        return self.only_first + self.only_second

    @property
    def all_identical(self) -> bool:
        """Whether every answer has the same tokens."""
        return self.identical == self.answers

    @property
    def same_score(self) -> bool:
        """Whether both have as many right."""
        return self.correct[0] == self.correct[1]


def compare(first: RunFile, second: RunFile) -> Comparison:
    """Pairs the answers of two runs, problem by problem; one that is in one alone counts for none.

    Raises:
        MeshwenError: they have no answer in common, or a problem has another prompt.
    """
    keys = sorted(first.records.keys() & second.records.keys())
    if not keys:
        raise MeshwenError(
            f"no problem has an answer in both {first.path} ({len(first.records)} answers) and "
            f"{second.path} ({len(second.records)}): go on with one of them with --resume, or ask "
            "both with the same --limit and --offset"
        )
    pairs = {key: (first.records[key], second.records[key]) for key in keys}
    for (problem, _), (one, other) in pairs.items():
        told = _has_tokens(one) and _has_tokens(other)
        for name in ("prompt_sha256" if told else "question", "gold"):
            if one[name] != other[name]:
                raise MeshwenError(
                    f"problem {problem} has another {name} in {second.path} than in {first.path}: "
                    "the runs are of other data, prompts or tokenizers"
                )
    flips = {key: one["correct"] - other["correct"] for key, (one, other) in pairs.items()}
    only_first = tuple(key for key, flip in flips.items() if flip > 0)
    only_second = tuple(key for key, flip in flips.items() if flip < 0)
    parted = tuple(
        (*key, place)
        for key, pair in pairs.items()
        if (place := _first_difference(*pair)) is not None
    )
    sampled = len({problem for problem, _ in keys}) < len(keys)
    return Comparison(
        len(keys),
        (
            sum(one["correct"] for one, _ in pairs.values()),
            sum(other["correct"] for _, other in pairs.values()),
        ),
        only_first,
        only_second,
        None if sampled else mcnemar(len(only_first), len(only_second)),
        len(keys) - len(parted),
        parted,
        (
            tuple(sorted(first.records.keys() - second.records.keys())),
            tuple(sorted(second.records.keys() - first.records.keys())),
        ),
    )


def alone_text(found: Comparison, runs: Sequence[RunFile]) -> str:
    """How many answers only one of two runs has."""
    counts = " and ".join(
        f"{len(keys)} in {run.path}" for run, keys in zip(runs, found.alone, strict=True) if keys
    )
    return f"compared: the answers that both have; in one run alone, and left out: {counts}"


def settings_of(runs: Sequence[RunFile]) -> dict[str, list[Any]]:
    """Each setting that any run has, with its value in every run."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return {name: [run.settings.get(name) for run in runs] for name in names}


def settings_apart(runs: Sequence[RunFile]) -> dict[str, list[Any]]:
    """The settings that the runs differ in; why a style was chosen is none that changes answers."""
    return {
        name: values
        for name, values in settings_of(runs).items()
        if name != "prompt_style_why" and values.count(values[0]) < len(values)
    }


def _has_tokens(record: Record) -> bool:
    """Whether the tokens of an answer are known, and so those of its prompt."""
    return bool(record["tokens"]) or record["finish_reason"] == "error"


def _first_difference(one: Record, other: Record) -> int | None:
    """The index of the first token, or character, that differs; past one's end, its length."""
    what = "tokens" if _has_tokens(one) and _has_tokens(other) else "text"
    ours, theirs = one[what], other[what]
    if ours == theirs:
        return None
    pairs = zip(ours, theirs, strict=False)
    shorter = min(len(ours), len(theirs))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
