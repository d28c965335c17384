# SPDX-License-Identifier: Apache-2.0
"""Guesses of what follows, looked up in what came before.

Answers repeat their prompts: names, code that is edited, texts that are quoted. Where the last
tokens stood before, what followed them is guessed to follow again (prompt lookup decoding, Saxena
2023; the idea of arXiv 2304.04487). A decode step reads the guesses along with the newest token,
which costs little more where memory decides its speed, and each guess that the model agrees with is
a step saved.
"""

from __future__ import annotations

from collections.abc import Iterable

_SIZES = (3, 2)  # of the runs of tokens that are looked up, the longer first
_LONGEST_PAUSE = 32


class PromptLookup:
    """Guesses for one sequence."""

    def __init__(self, tokens: Iterable[int]):
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # Where the newest token after a run stands.
        self._pause, self._steps = 0, 0
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Takes the next token."""
        end = len(self._tokens)
        for size in _SIZES:
            if end >= size:
                self._after[tuple(self._tokens[end - size :])] = end
        self._tokens.append(token)

    def guesses(self, count: int) -> list[int]:
        """What may follow: `count` tokens, or none."""
        if self._steps:
            self._steps -= 1
            return []
        end = len(self._tokens)
        for size in _SIZES:
            start = self._after.get(tuple(self._tokens[-size:]))
            if start is not None:  # Nearer to the end than `count`: the run repeats itself.
                return [self._tokens[start + i % (end - start)] for i in range(count)]
        return []

    def judge(self, right: int) -> None:
        """Told how many guesses were right; after wrong ones it rests, longer each time."""
        self._pause = 0 if right else min(2 * self._pause + 1, _LONGEST_PAUSE)
        self._steps = self._pause
