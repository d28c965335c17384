# SPDX-License-Identifier: Apache-2.0
"""Two runs on the same problems, answer by answer."""

from __future__ import annotations

from dataclasses import dataclass

from meshwen.errors import MeshwenError
from meshwen.evals.run_file import Record, RunFile
from meshwen.evals.statistics import mcnemar


@dataclass(frozen=True)
class Comparison:
    """What differs between two runs.

    Attributes:
        problems: how many both have answered.
        correct: how many each has right.
        only_first: numbers of problems that the first alone has right.
        only_second: those that the second alone has right.
        p: of McNemar's exact test, two-sided.
        identical: answers with the same tokens.
        parted: of each other problem, the first token that differs, counted from 0.
    """

    problems: int
    correct: tuple[int, int]
    only_first: tuple[int, ...]
    only_second: tuple[int, ...]
    p: float
    identical: int
    parted: dict[int, int]

    @property
    def all_identical(self) -> bool:
        """Whether every answer has the same tokens."""
        return self.identical == self.problems

    @property
    def same_score(self) -> bool:
        """Whether both have as many right."""
        return self.correct[0] == self.correct[1]


def compare(first: RunFile, second: RunFile) -> Comparison:
    """Pairs two runs, problem by problem.

    Raises:
        MeshwenError: they are of other problems, or a problem was asked otherwise.
    """
    ids = sorted(first.records)
    if ids != sorted(second.records):
        missing = sorted(set(first.records) ^ set(second.records))
        raise MeshwenError(
            f"{first.path} and {second.path} are not of the same problems: {len(missing)} are in "
            f"one alone, first {missing[0]}; finish both with --resume"
        )
    if not ids:
        raise MeshwenError(f"{first.path} and {second.path} have no answers")
    pairs = {i: (first.records[i], second.records[i]) for i in ids}
    for i, (one, other) in pairs.items():
        for name in ("prompt_sha256", "gold"):
            if one[name] != other[name]:
                raise MeshwenError(
                    f"problem {i} has another {name} in {second.path} than in {first.path}: the "
                    "runs are of other data, prompts or tokenizers"
                )
    flips = {i: one["correct"] - other["correct"] for i, (one, other) in pairs.items()}
    only_first = tuple(i for i, flip in flips.items() if flip > 0)
    only_second = tuple(i for i, flip in flips.items() if flip < 0)
    parted = {
        i: place for i, pair in pairs.items() if (place := _first_difference(*pair)) is not None
    }
    return Comparison(
        len(ids),
        (
            sum(one["correct"] for one, _ in pairs.values()),
            sum(other["correct"] for _, other in pairs.values()),
        ),
        only_first,
        only_second,
        mcnemar(len(only_first), len(only_second)),
        len(ids) - len(parted),
        parted,
    )


def _first_difference(one: Record, other: Record) -> int | None:
    """Where the tokens of two answers part; where one ends, for its beginning."""
    ours, theirs = one["tokens"], other["tokens"]
    if ours == theirs:
        return None
    pairs = zip(ours, theirs, strict=False)
    shorter = min(len(ours), len(theirs))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
