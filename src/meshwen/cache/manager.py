# SPDX-License-Identifier: Apache-2.0
"""The KV cache of an engine: its arrays, which sequence has which row, and when it grows.

Every sequence has a row of its own, and all rows have one length. Scheduler and step loop need to
know neither: they ask for sequences, positions and rows of the batch, and pass the arrays to the
compiled steps unread.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

from meshwen.cache.budget import CacheBudget
from meshwen.cache.kv_cache import KVCache
from meshwen.runtime.shape_buckets import shape_bucket

logger = logging.getLogger(__name__)


class CachePrograms(Protocol):
    """The compiled programs that make and change a cache's arrays."""

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """Zeros for `batch` rows of `length` positions."""

    def resized(self, cache: KVCache, batch: int, length: int) -> KVCache:
        """A copy with more rows (on each part of the batch) and positions, the new ones zero."""

    def without_row(self, cache: KVCache, row: int) -> KVCache:
        """The cache, donated, with zeros in a row."""


class CacheManager:
    """The KV cache's arrays and rows.

    The cache is made when there is something to run, as large as that needs: rows up to a power of
    two, lengths up to a shape bucket. While sequences are in it, it grows with what waits and with
    them, within the budget.

    Args:
        programs: make and change the arrays.
        budget: what they may take.

    Attributes:
        arrays: what steps take as the cache, donated, and return another of; for them alone.
        batch_size: rows that a decode step computes, used or not. Each part of the batch has
            equally many, one after the other.
    """

    def __init__(self, programs: CachePrograms, budget: CacheBudget):
        self._programs, self._budget = programs, budget
        self.clear()

    def clear(self) -> None:
        """Drops the arrays and all sequences."""
        self.arrays: KVCache = ()
        self.batch_size = self._length = 0
        self._row_of: dict[int, int] = {}  # Of each sequence, by its number.

    def row(self, sequence: int) -> int:
        """The row in the batch that a sequence has; it may be another after `make_room`."""
        return self._row_of[sequence]

    def prefill_rows(self, sequences: Mapping[int, int]) -> list[int]:
        """The rows that a prefill writes to, as `ModelRunner.prefill` takes them.

        Args:
            sequences: at most one of each part of the batch, by part.

        Returns:
            Of each part a row, counted from its first; any where it has no sequence.
        """
        rows = [0] * self._budget.parts
        for part, sequence in sequences.items():
            rows[part] = self._row_of[sequence] % self._rows_a_part
        return rows

    def make_room(self, waiting: int, positions: int) -> bool:
        """Adapts the cache to what waits, as far as memory and the sequences in it allow.

        An empty one becomes as small as it may be.

        Args:
            waiting: sequences that wait.
            positions: that the first of them needs; where the cache is empty, the most that any of
                them needs.

        Returns:
            Whether the shape has changed.

        Raises:
            MeshwenError: not even one sequence on each part fits into an empty cache.
        """
        count = len(self._row_of) + waiting
        if not self._row_of:
            length = shape_bucket(positions)
            return self._replace(self._budget.rows(count, length), length, waiting)
        length = max(self._length, shape_bucket(positions))
        rows = max(self.batch_size, self._budget.rows(count, length))
        return self._grow(rows, length) or self._grow(self.batch_size, length)

    def allocate(self, sequence: int, positions: int, part: int) -> bool:
        """Gives a sequence the first free row of a part of the batch.

        Returns:
            Whether it has one: not where none is free, or rows have fewer `positions`.
        """
        if positions > self._length:
            return False
        first, taken = part * self._rows_a_part, set(self._row_of.values())
        free = (row for row in range(first, first + self._rows_a_part) if row not in taken)
        row = next(free, None)
        if row is None:
            return False
        self._row_of[sequence] = row
        return True

    def has_position(self, position: int) -> bool:
        """Whether the sequences in the cache have room for a token at this position."""
        return position < self._length

    def extend(self, positions: int) -> bool:
        """Makes rows longer.

        Args:
            positions: the most that a sequence may come to need.

        Returns:
            Whether there was memory for it.
        """
        # Twice as long, so that it is copied rarely.
        lengths = min(2 * self._length, shape_bucket(positions)), shape_bucket(self._length + 1)
        return any(self._grow(self.batch_size, length) for length in lengths)

    def free(self, sequence: int, *, zero: bool) -> None:
        """Takes a sequence's row from it.

        Args:
            sequence: its number.
            zero: clear the row: NaN in it would reach the next sequence, though masked.
        """
        row = self._row_of[sequence]
        if zero:
            self.arrays = self._programs.without_row(self.arrays, row)
        del self._row_of[sequence]

    @property
    def _rows_a_part(self) -> int:
        return self.batch_size // self._budget.parts

    def _grow(self, rows: int, length: int) -> bool:
        """Makes the cache larger, if there is memory for that."""
        old, new = (self.batch_size, self._length), (rows, length)
        if new == old or not self._budget.holds(old, new):  # Both exist for a moment.
            return False
        self.arrays = self._programs.resized(self.arrays, rows, length)
        before = self._rows_a_part
        self.batch_size, self._length = rows, length
        for sequence, row in self._row_of.items():  # Each part has its new rows behind its old.
            self._row_of[sequence] = row // before * self._rows_a_part + row % before
        return True

    def _replace(self, rows: int, length: int, waiting: int) -> bool:
        """Makes an empty cache of another shape."""
        if (rows, length) == (self.batch_size, self._length):
            return False
        self.arrays = ()  # Free before the next is made.
        self.arrays = self._programs.empty_cache(rows, length)
        self.batch_size, self._length = rows, length
        needed = min(self._budget.max_num_seqs, waiting)
        if rows < needed:
            logger.warning(
                "the memory for the KV cache has room for %d of %d sequences of %d tokens at once",
                rows,
                needed,
                length,
            )
        return True
