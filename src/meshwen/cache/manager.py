# SPDX-License-Identifier: Apache-2.0
"""The KV cache of an engine: its arrays, which sequence has which row, and when it grows.

Every sequence has a row of its own, and all rows have one length. This is where a cache of another
kind would come in: who schedules sequences asks for room and knows of no array.
"""

from __future__ import annotations

import logging
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
        arrays: the cache; steps replace it by what they return.
        rows: of the arrays. Each part of the batch has equally many, one after the other.
        length: positions of a row.
    """

    def __init__(self, programs: CachePrograms, budget: CacheBudget):
        self._programs, self._budget = programs, budget
        self.clear()

    def clear(self) -> None:
        """Drops the arrays and all sequences."""
        self.arrays: KVCache = ()
        self.rows = self.length = 0
        self._row_of: dict[int, int] = {}  # Of each sequence, by its number.

    def row(self, sequence: int) -> int:
        """The row of a sequence; it may be another after `make_room`."""
        return self._row_of[sequence]

    def row_of_part(self, sequence: int) -> int:
        """The same, counted from the first row of its part of the batch."""
        return self._row_of[sequence] % self._rows_a_part

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
        wanted = len(self._row_of) + waiting
        if not self._row_of:
            length = shape_bucket(positions)
            return self._replace(self._budget.rows(wanted, length), length, waiting)
        length = max(self.length, shape_bucket(positions))
        rows = max(self.rows, self._budget.rows(wanted, length))
        return self._grow(rows, length) or self._grow(self.rows, length)

    def allocate(self, sequence: int, positions: int, part: int) -> bool:
        """Gives a sequence the first free row of a part of the batch.

        Returns:
            Whether it has one: not where none is free, or rows have fewer `positions`.
        """
        if positions > self.length:
            return False
        first, taken = part * self._rows_a_part, set(self._row_of.values())
        free = (row for row in range(first, first + self._rows_a_part) if row not in taken)
        row = next(free, None)
        if row is None:
            return False
        self._row_of[sequence] = row
        return True

    def has_position(self, position: int) -> bool:
        """Whether a row has room for a token at this position."""
        return position < self.length

    def extend(self, positions: int) -> bool:
        """Makes rows longer.

        Args:
            positions: the most that a sequence may come to need.

        Returns:
            Whether there was memory for it.
        """
        # Twice as long, so that it is copied rarely.
        twice = min(2 * self.length, shape_bucket(positions))
        return self._grow(self.rows, twice) or self._grow(self.rows, shape_bucket(self.length + 1))

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
        return self.rows // self._budget.parts

    def _grow(self, rows: int, length: int) -> bool:
        """Makes the cache larger, if there is memory for that."""
        old, new = (self.rows, self.length), (rows, length)
        if new == old or not self._budget.holds(old, new):  # Both exist for a moment.
            return False
        self.arrays = self._programs.resized(self.arrays, rows, length)
        before = self._rows_a_part
        self.rows, self.length = rows, length
        for sequence, row in self._row_of.items():  # Each part has its new rows behind its old.
            self._row_of[sequence] = row // before * self._rows_a_part + row % before
        return True

    def _replace(self, rows: int, length: int, waiting: int) -> bool:
        """Makes an empty cache of another shape."""
        if (rows, length) == (self.rows, self.length):
            return False
        self.arrays = ()  # Free before the next is made.
        self.arrays = self._programs.empty_cache(rows, length)
        self.rows, self.length = rows, length
        wanted = min(self._budget.max_num_seqs, waiting)
        if rows < wanted:
            logger.warning(
                "the memory for the KV cache has room for %d of %d sequences of %d tokens at once",
                rows,
                wanted,
                length,
            )
        return True
