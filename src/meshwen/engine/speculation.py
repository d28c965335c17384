# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: draft tokens that a decode step checks along with the newest tokens.

A step samples the token that follows the newest one and each draft. As long as a draft is the token
that was sampled in its place, what was sampled after it counts too. The answer is that of decoding
without drafts, in exact numerics to the bit; in fast numerics a step of several tokens may round
otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meshwen.engine.batch_sampler import BatchSampler
from meshwen.engine.drafter import MOST_DRAFTS, Drafter
from meshwen.engine.sequence import SequenceState

# The most tokens of a step with drafts: with more, its matmuls take longer than to read weights.
_MOST_TOKENS = 32


class Speculation:
    """Decides when there are drafts, and which of them count.

    Args:
        drafter: proposes them.
        num_tokens: the most drafts of a sequence in a step, up to `MOST_DRAFTS`; 0: none.
    """

    def __init__(self, drafter: Drafter, num_tokens: int):
        assert 0 <= num_tokens <= MOST_DRAFTS
        self.num_tokens = num_tokens
        self._drafter = drafter
        self._sequences: dict[int, SequenceState] = {}  # That were proposed for.

    def drafts(
        self, sequences: Mapping[int, SequenceState], batch_size: int, sampler: BatchSampler
    ) -> dict[int, Sequence[int]]:
        """Drafts for a decode step, by row; empty where it should have none.

        Args:
            sequences: those of the step, by row.
            batch_size: rows that the step computes, used or not.
            sampler: that of the step.
        """
        if not self._useful(batch_size, sampler):
            return {}
        some = {row: one for row, one in sequences.items() if _takes_drafts(one)}
        self._sequences |= {one.number: one for one in some.values()}
        proposed = self._drafter.propose(some, self.num_tokens)
        fitting = {row: _fitting(some[row], drafts) for row, drafts in proposed.items()}
        for row, drafts in proposed.items():
            if len(drafts) and not len(fitting[row]):
                self.refuse(some[row])
        return {row: drafts for row, drafts in fitting.items() if len(drafts)}

    def _useful(self, batch_size: int, sampler: BatchSampler) -> bool:
        """Whether a step may have drafts: all the reasons against them."""
        if not self.num_tokens:
            return False
        if sampler.method.penalize:  # Each draft would need masks of its own.
            return False
        return batch_size * (1 + self.num_tokens) <= _MOST_TOKENS

    def accept(self, sequence: SequenceState, drafts: Sequence[int], sampled: Sequence[int]) -> int:
        """How many of a sequence's drafts are right; the drafter learns it too.

        Args:
            sequence: the sequence.
            drafts: what was proposed to follow its newest token.
            sampled: what the step sampled after the newest token and after each draft.
        """
        if not len(drafts):
            return 0
        wrong = (i for i, draft in enumerate(drafts) if draft != sampled[i])
        count = next(wrong, len(drafts))
        self._drafter.report_accepted(sequence, count)
        return count

    def refuse(self, sequence: SequenceState) -> None:
        """Lets the drafter learn that a step had no place for what it has proposed."""
        self._drafter.report_accepted(sequence, 0)

    def forget_ended(self) -> None:
        """Lets the drafter forget the sequences that have ended."""
        for one in [one for one in self._sequences.values() if one.ended]:
            self._drafter.forget(one)
            del self._sequences[one.number]

    def clear(self) -> None:
        """Lets the drafter forget all sequences."""
        for one in self._sequences.values():
            self._drafter.forget(one)
        self._sequences.clear()


def _takes_drafts(sequence: SequenceState) -> bool:
    return sequence.constraints is None or sequence.constraints.take_drafts


def _fitting(sequence: SequenceState, drafts: Sequence[int]) -> Sequence[int]:
    """The first of some drafts, as far as the sequence's constraints let them come."""
    if sequence.constraints is None:
        return drafts
    return drafts[: sequence.constraints.fitting(drafts)]
