# SPDX-License-Identifier: Apache-2.0
"""What a step computes: which tokens of which sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from meshwen.engine.sequence import SequenceState
from meshwen.engine.step_inputs import RowTokens, StepInputs, step_inputs
from meshwen.runtime.shape_buckets import step_bucket

# A step with chunks of prompts is compiled for a power of this many sequences, and for at least as
# many tokens, so that few are.
_FEWEST = 8


@dataclass
class Chunk:
    """Tokens of a sequence in a step.

    Attributes:
        sequence: the sequence.
        row: its row in its part of the batch.
        start: position of the first token.
        count: tokens; the last one is the sequence's newest where something is to follow it.
        drafts: draft tokens after these.
        after: the row of the sequence that this one begins as a copy of, in this step; then it has
            no tokens of its own.
    """

    sequence: SequenceState
    row: int
    start: int
    count: int
    drafts: Sequence[int] = ()
    after: int | None = None

    @property
    def samples(self) -> bool:
        """Whether a token is sampled after it."""
        return self.start + self.count == self.sequence.length

    @property
    def scored(self) -> bool:
        """Whether log-probabilities are asked for that follow from it."""
        prompt = self.sequence.prompt_logprobs
        last = len(self.sequence.request.prompt_tokens) - 1
        return prompt is not None and not prompt.is_complete and self.start < last

    @property
    def tokens(self) -> list[int]:
        """Its tokens, drafts included."""
        own = self.sequence.token_ids[self.start : self.start + self.count]
        return [*own, *self.drafts]


@dataclass
class StepPlan:
    """A step.

    Attributes:
        chunks: of each part of the batch, in the order of their rows.
        rows: the most sequences that a part has, whether they are in this step or not.
        most_rows: that a part may have.
        prefills: whether some chunk is not its sequence's newest token alone.
        copies: of each part, blocks to copy when the step is done: (source, destination).
    """

    chunks: list[list[Chunk]]
    rows: int = 0
    most_rows: int = 1
    prefills: bool = False
    copies: list[list[tuple[int, int]]] = field(default_factory=list)

    def __iter__(self) -> Iterator[Chunk]:
        """All chunks."""
        return (chunk for part in self.chunks for chunk in part)

    @property
    def samples(self) -> bool:
        """Whether a token is sampled after any chunk."""
        return any(chunk.samples for chunk in self)

    @property
    def row_bucket(self) -> int:
        """R: for how many sequences a part's step is compiled."""
        bucket = _FEWEST if self.prefills else 1
        while bucket < self.rows:
            bucket *= _FEWEST if self.prefills else 2
        return min(bucket, self.most_rows)

    @property
    def token_bucket(self) -> int:
        """N: for how many tokens a part's step is compiled."""
        most = max(sum(c.count + len(c.drafts) for c in part) for part in self.chunks)
        if self.prefills:
            return max(step_bucket(most), _FEWEST)
        alone = all(c.count <= 1 and not c.drafts for c in self)
        return self.row_bucket if alone else step_bucket(most)

    @property
    def drafts(self) -> bool:
        """Whether some chunk has draft tokens; then something is asked for after every token."""
        return any(chunk.drafts for chunk in self)

    def places(self) -> Iterator[tuple[Chunk, slice]]:
        """Each chunk, and where its tokens are among those of the whole step."""
        for part, chunks in enumerate(self.chunks):
            end = part * self.token_bucket
            for chunk in chunks:
                first, end = end, end + chunk.count + len(chunk.drafts)
                yield chunk, slice(first, end)

    def sampled(self) -> Iterator[tuple[int, Chunk, range]]:
        """Row and chunk of each sequence that is sampled for, and the indices of its samples."""
        if self.drafts:
            rows = {id(chunk): row for row, chunk in self.by_row().items()}
            for chunk, place in self.places():
                yield rows[id(chunk)], chunk, range(place.start, place.stop)
            return
        for row, chunk in self.by_row().items():
            if chunk.samples:
                yield row, chunk, range(row, row + 1)

    def by_row(self) -> dict[int, Chunk]:
        """The chunks by row of the whole batch: part * R + row."""
        R = self.row_bucket
        return {
            part * R + chunk.row: chunk
            for part, chunks in enumerate(self.chunks)
            for chunk in chunks
        }


class InputArrays:
    """Makes the arrays of steps; what stays the same from step to step is kept.

    Args:
        table: the block table of a sequence, by its number; it only grows while rows stay.
        width: for a number of blocks that the longest sequence has, how wide tables are.
    """

    def __init__(self, table: Callable[[int], Sequence[int]], width: Callable[[int], int]):
        self._table, self._width = table, width
        self._version: tuple[int, ...] = ()
        self._tables = np.zeros((0, 0), np.int32)
        self._filled: list[int] = []

    def inputs(self, plan: StepPlan, version: int) -> StepInputs:
        """A step's.

        Args:
            plan: the step.
            version: a number that changes with every change of what is in which row.
        """
        parts = [
            [RowTokens(c.row, c.start, c.tokens, c.samples, c.after) for c in chunks]
            for chunks in plan.chunks
        ]
        tables = self._filled_tables(plan, version)
        return step_inputs(parts, plan.row_bucket, plan.token_bucket, tables, every=plan.drafts)

    def _filled_tables(self, plan: StepPlan, version: int) -> np.ndarray:
        rows = plan.by_row()
        tables = {row: self._table(chunk.sequence.number) for row, chunk in rows.items()}
        width = self._width(max(map(len, tables.values())))
        shape = len(plan.chunks) * plan.row_bucket, width
        if (version, *shape) != self._version:
            self._version = (version, *shape)
            self._tables, self._filled = np.zeros(shape, np.int32), [0] * shape[0]
        for row, table in tables.items():
            filled = self._filled[row]
            if filled < len(table):
                self._tables[row, filled : len(table)] = table[filled:]
                self._filled[row] = len(table)
        return self._tables
