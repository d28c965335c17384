# SPDX-License-Identifier: Apache-2.0
"""What proposes draft tokens for speculative decoding: a lookup, or a smaller model.

Importing this imports no JAX: options state the most drafts that there may be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from meshwen.runtime.shape_buckets import SMALLEST_BUCKET

if TYPE_CHECKING:
    from meshwen.engine.sequence import SequenceState

# The most drafts of a sequence in a step: with its newest token, they fill the smallest bucket.
MOST_DRAFTS = SMALLEST_BUCKET - 1


class Drafter(Protocol):
    """Proposes draft tokens: from a lookup, or from a smaller model that runs beside.

    Between two calls of `propose` a sequence may have got tokens, another row, or nothing at all;
    other sequences may have come. What a drafter keeps of a sequence, such as keys and values, it
    brings up to date by the tokens of the `SequenceState`, which only grow; `report_accepted` says
    how much of its drafts stands, and `forget` that nothing more is needed.
    """

    def propose(
        self, sequences: Mapping[int, SequenceState], count: int
    ) -> Mapping[int, Sequence[int]]:
        """Draft tokens for a decode step.

        Args:
            sequences: those of the step, by their row in the batch.
            count: the most drafts of each.

        Returns:
            By row, tokens that may follow the sequence's newest one, in their order. A row may be
            left out.
        """

    def report_accepted(self, sequence: SequenceState, count: int) -> None:
        """Called in each step that drafts were proposed for, before the sequence gets its tokens.

        The other drafts were rejected: of what a drafter keeps, the first `sequence.length + count`
        positions stand.

        Args:
            sequence: the sequence.
            count: how many of its drafts the model agreed with.
        """

    def forget(self, sequence: SequenceState) -> None:
        """Called when a sequence has ended or is dropped.

        There may be nothing of it: an interrupt comes anywhere, before `propose` too.
        """
