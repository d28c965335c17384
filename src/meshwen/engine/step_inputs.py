# SPDX-License-Identifier: Apache-2.0
"""The tokens of a step as the arrays that programs take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from meshwen.runtime.shape_buckets import power_of_two


class StepInputs(NamedTuple):
    """A step's tokens as programs take them: of each of the P parts of the batch equally many.

    Indices and block numbers are a part's own; axes say what one part has. Each device's step gets
    those of its part.

    Attributes:
        token_ids: int32 [P*N].
        positions, query_starts, lengths, tables: int32 [P*N], [P*(R+1)], [P*R], [P*R, W]: see
            `meshwen.ops.paged.PagedTokens`.
        asked: int32 [P*B], the tokens after which one is sampled; -1: none. None: all, and nothing
            is sampled.
        sampler_rows: int32 [P*B], their sequences; None: each row's own, B = R.
    """

    token_ids: Any
    positions: Any
    query_starts: Any
    lengths: Any
    tables: Any
    asked: Any
    sampler_rows: Any

    @property
    def where(self) -> tuple[Any, Any, Any, Any]:
        """Where the tokens are, and what they see: positions, query_starts, lengths, tables."""
        return self[1:5]

    def of_all(self) -> StepInputs:
        """The same tokens, all of which are asked for."""
        return self._replace(asked=None, sampler_rows=None)

    def of_asked(self) -> StepInputs:
        """The tokens asked for alone, each in its row's place, to sample from their states."""
        parts = len(self.query_starts) - len(self.lengths)
        positions, asked = (a.reshape(parts, -1) for a in (self.positions, self.asked))
        own = np.take_along_axis(positions, np.maximum(asked, 0), axis=1)
        rows = np.arange(asked.shape[1], dtype=np.int32)
        asked = np.where(asked < 0, asked, rows)
        return StepInputs(None, own.reshape(-1), None, None, None, asked.reshape(-1), None)


class RowTokens(NamedTuple):
    """Tokens of one sequence that follow one another.

    Attributes:
        row: of the sequence, in its part of the batch.
        start: position of the first token.
        token_ids: of the tokens.
        samples: whether one is sampled after the last.
        after: the row after whose last token that is; None: this row. A row that samples after
            another's has no tokens.
    """

    row: int
    start: int
    token_ids: Sequence[int]
    samples: bool = True
    after: int | None = None


def step_inputs(
    parts: Sequence[Sequence[RowTokens]],
    rows: int,
    count: int,
    tables: np.ndarray,
    *,
    every: bool = False,
) -> StepInputs:
    """The arrays of a step.

    Args:
        parts: of the batch: what each computes, in the order of rows, a row once.
        rows: R.
        count: N, at least as many tokens as any part has.
        tables: int32 [P*R, W], the rows' block tables.
        every: sample after every token: B is N.
    """
    P, width = len(parts), count if every else rows
    token_ids, positions = np.zeros((P, count), np.int32), np.zeros((P, count), np.int32)
    counts, lengths = np.zeros((P, rows + 1), np.int32), np.zeros((P, rows), np.int32)
    asked, sampler_rows = np.full((P, width), -1, np.int32), np.zeros((P, width), np.int32)
    for part, some in enumerate(parts):
        ids: list[int] = []  # Lists grow faster than small slices of arrays are assigned.
        places: list[int] = []
        owners: list[int] = []
        last: dict[int, int] = {}
        for row, start, tokens, samples, after in some:
            ids.extend(tokens)
            places.extend(range(start, start + len(tokens)))
            owners.extend([row] * len(tokens))
            last[row] = len(ids) - 1
            if len(tokens):
                counts[part, row + 1], lengths[part, row] = len(tokens), start + len(tokens)
            if samples and not every:
                asked[part, row] = last[row if after is None else after]
        end = len(ids)
        token_ids[part, :end], positions[part, :end] = ids, places
        if every:
            asked[part, :end], sampler_rows[part, :end] = np.arange(end), owners
    return StepInputs(
        token_ids.reshape(-1),
        positions.reshape(-1),
        counts.cumsum(axis=1, dtype=np.int32).reshape(-1),
        lengths.reshape(-1),
        tables,
        asked.reshape(-1),
        sampler_rows.reshape(-1) if every else None,
    )


def copied(parts: Sequence[Sequence[tuple[int, int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Blocks to copy, of each part: sources and destinations as `copied_blocks` takes them.

    Equally many of each part, a power of two: the null block is copied to itself.
    """
    count = power_of_two(max(map(len, parts)))
    pairs = np.zeros((2, len(parts), count), np.int32)
    for part, some in enumerate(parts):
        if some:
            pairs[:, part, : len(some)] = np.array(some, np.int32).T
    return pairs[0].reshape(-1), pairs[1].reshape(-1)


def in_parts(
    tokens: Sequence[Sequence[int]] | np.ndarray, starts: np.ndarray, parts: int
) -> list[list[RowTokens]]:
    """Tokens of as many sequences as there are rows, equally many of each part of the batch."""
    size = len(tokens) // parts
    rows = [
        RowTokens(i % size, int(start), ids)
        for i, (ids, start) in enumerate(zip(tokens, starts, strict=True))
    ]
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def tables_in_order(parts: int, rows: int, blocks: int) -> np.ndarray:
    """Tables of sequences that have equally many blocks, from block 1 on: int32 [P*R, blocks]."""
    own = 1 + np.arange(rows * blocks, dtype=np.int32).reshape(rows, blocks)
    return np.tile(own, (parts, 1))
