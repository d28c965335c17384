# SPDX-License-Identifier: Apache-2.0
"""Draft tokens that are looked up in what came before.

Answers repeat their prompts: names, code that is edited, texts that are quoted. Where the last
tokens stood before, what followed them then is proposed to follow again (prompt lookup decoding,
Saxena 2023; the idea of arXiv 2304.04487). A decode step takes the drafts along with the newest
token, which costs little more where memory decides its speed, and each draft that the model agrees
with is a step saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from meshwen.engine.sequence import SequenceState

_NGRAM_SIZES = (3, 2)  # that are looked up, the longer first
_LONGEST_PAUSE = 32  # steps


class PromptLookup:
    """Proposes drafts for a batch; see `meshwen.engine.drafter.Drafter`."""

    def __init__(self) -> None:
        self._of: dict[int, SequenceLookup] = {}  # By the sequence's number.

    def propose(self, sequences: Mapping[int, SequenceState], count: int) -> dict[int, list[int]]:
        """By row, `count` tokens that may follow; rows with nothing to propose are left out."""
        found = {row: self._lookup(one).drafts(count) for row, one in sequences.items()}
        return {row: drafts for row, drafts in found.items() if drafts}

    def report_accepted(self, sequence: SequenceState, count: int) -> None:
        """Takes note of how many of a sequence's drafts the model agreed with."""
        self._of[sequence.number].report_accepted(count)

    def forget(self, sequence: SequenceState) -> None:
        """Drops the n-grams of a sequence."""
        self._of.pop(sequence.number, None)

    def _lookup(self, sequence: SequenceState) -> SequenceLookup:
        """A sequence's lookup, up to its newest token."""
        lookup = self._of.setdefault(sequence.number, SequenceLookup())
        if lookup.length < sequence.length:
            lookup.extend(sequence.token_ids[lookup.length :])
        return lookup


class SequenceLookup:
    """The n-grams of one sequence."""

    def __init__(self, tokens: Iterable[int] = ()):
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # Index of the newest token after an n-gram.
        self._pause, self._steps_left = 0, 0
        self.extend(tokens)

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Takes the next tokens."""
        for token in tokens:
            end = len(self._tokens)
            for size in _NGRAM_SIZES:
                if end >= size:
                    self._after[tuple(self._tokens[end - size :])] = end
            self._tokens.append(token)

    def drafts(self, count: int) -> list[int]:
        """What may follow: `count` tokens, or none."""
        if self._steps_left:
            self._steps_left -= 1
            return []
        end = len(self._tokens)
        for size in _NGRAM_SIZES:
            start = self._after.get(tuple(self._tokens[-size:]))
            if start is not None:  # Nearer to the end than `count`: the n-gram repeats itself.
                return [self._tokens[start + i % (end - start)] for i in range(count)]
        return []

    def report_accepted(self, count: int) -> None:
        """Takes note of how many drafts were right; after none it pauses, longer each time."""
        self._pause = 0 if count else min(2 * self._pause + 1, _LONGEST_PAUSE)
        self._steps_left = self._pause
