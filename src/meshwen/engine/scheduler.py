# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: who waits, who has a place in the cache, and what each step computes.

A request waits until the cache has room for it; its prompt is prefilled there, chunk by chunk,
while other answers go on; then it takes part in every decode step, and when it ends, the next
request gets its place at once. This is policy alone: it computes nothing, and knows the cache only
by what it may ask of one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol

from meshwen.engine.limits import SequenceLimits
from meshwen.engine.prefill import Prefill
from meshwen.engine.sequence import SequenceState

# Chunks of prompts that may be prefilled one after the other while answers wait for their next
# token.
_MOST_CHUNKS = 8


class CacheSpace(Protocol):
    """What the scheduler asks of the cache; sequences are known by their numbers."""

    @property
    def batch_size(self) -> int:
        """Rows of the batch that a decode step computes, used or not."""

    def make_room(self, waiting: int, positions: int) -> bool:
        """Adapts the cache to what waits, as far as memory and the sequences in it allow.

        Args:
            waiting: sequences that wait.
            positions: that the first of them needs; where the cache is empty, the most that any of
                them needs.

        Returns:
            Whether rows were added, moved or changed in length.
        """

    def allocate(self, sequence: int, positions: int, part: int) -> bool:
        """Gives a sequence a free row on a part of the batch; false where it has no room there."""

    def has_position(self, position: int) -> bool:
        """Whether the sequences in the cache have room for a token at this position."""

    def extend(self, positions: int) -> bool:
        """Gives the sequences in the cache room for more tokens.

        Args:
            positions: the most that one of them may come to need.

        Returns:
            Whether there was memory for it.
        """

    def row(self, sequence: int) -> int:
        """The row of a sequence in the batch: the same until rows are added or moved."""

    def free(self, sequence: int, *, zero: bool) -> None:
        """Takes a sequence's row from it; `zero`: what it holds must not reach the next."""


class Scheduler:
    """Decides what the next step computes; for one thread at a time.

    None overtakes: a request that there is no memory for waits until answers have ended, and those
    behind it wait too. So does an answer that the cache cannot be extended for: what there is of it
    is prefilled again.

    Args:
        cache: where sequences get their places.
        limits: what sequences need.
        parts: of the batch; each may prefill one prompt at a time.

    Attributes:
        batch_version: counts the changes of what runs in which row.
    """

    def __init__(self, cache: CacheSpace, limits: SequenceLimits, parts: int):
        self._cache, self._limits, self._parts = cache, limits, parts
        self.batch_version = 0
        self.clear()

    def clear(self) -> None:
        """Forgets all sequences; the cache is emptied by who owns it."""
        self._waiting: deque[SequenceState] = deque()
        self._cached: dict[int, SequenceState] = {}  # Those in the cache, by number.
        self._prefill: Prefill | None = None
        self._chunks_since_decode = 0
        self.batch_version += 1

    def add(self, sequences: Iterable[SequenceState]) -> None:
        """Lets sequences wait."""
        self._waiting.extend(sequences)

    @property
    def prefill(self) -> Prefill | None:
        """The prefill that is under way; None: none is."""
        return self._prefill

    def next_chunk(self) -> Prefill | None:
        """The prefill whose next chunk is to be computed; None where no prompt can begin."""
        self._make_room()
        if self._prefill is None:
            self._prefill = self._begin_prefill()
        self._chunks_since_decode = self._chunks_since_decode + 1 if self._prefill else _MOST_CHUNKS
        return self._prefill

    def chunk_done(self) -> bool:
        """Takes note that the chunk is computed.

        Returns:
            Whether it was the last: the prompts' answers are to begin.
        """
        assert self._prefill is not None
        self._prefill = self._prefill.advanced()
        if not self._prefill.is_complete:
            return False
        self._prefill = None
        self.batch_version += 1
        return True

    def next_decode(self) -> dict[int, SequenceState]:
        """By row, in their order, the sequences to decode a token of; empty: not now.

        While less than half of the rows have answers, a few prompts are prefilled first: a step of
        few answers costs almost what one of many does.
        """
        running = self._running()
        few = 2 * len(running) < self._cache.batch_size
        if not running or (few and self._chunks_since_decode < _MOST_CHUNKS):
            return {}
        self._chunks_since_decode = 0
        self._make_room_for_answers(running)
        return {self._cache.row(one.number): one for one in self._running()}

    def release_ended(self) -> None:
        """Frees the places of sequences that have ended."""
        ended = self._by_row(one for one in self._cached.values() if one.ended)
        if not ended:
            return
        for one in ended:
            # NaN must not reach the next in the row; of a cancelled one it is not known.
            self._cache.free(one.number, zero=one.finish_reason not in ("stop", "length"))
            del self._cached[one.number]
        if self._prefill is not None:
            self._prefill = self._prefill.without({one.number for one in ended})
        self.batch_version += 1

    def drop_cancelled(self) -> None:
        """Forgets sequences that were cancelled, waiting or not."""
        self._waiting = deque(one for one in self._waiting if not one.ended)
        self.release_ended()

    def _running(self) -> list[SequenceState]:
        """The sequences that a decode step gives a token to, in the order of their rows."""
        prefill = set(self._prefill.sequences.values()) if self._prefill else ()
        return self._by_row(s for s in self._cached.values() if s.tokens and s not in prefill)

    def _by_row(self, sequences: Iterable[SequenceState]) -> list[SequenceState]:
        return sorted(sequences, key=lambda one: self._cache.row(one.number))

    def _make_room(self) -> None:
        if not self._waiting:
            return
        needed = self._limits.positions_to_begin
        first = self._waiting[0]
        positions = needed(first) if self._cached else max(map(needed, self._waiting))
        if self._cache.make_room(len(self._waiting), positions):
            self.batch_version += 1

    def _begin_prefill(self) -> Prefill | None:
        """Places those that wait longest, one on each part of the batch."""
        begun: dict[int, SequenceState] = {}
        for part in range(self._parts):
            if not self._waiting:
                break
            first = self._waiting[0]
            positions = self._limits.positions_to_begin(first)
            if self._cache.allocate(first.number, positions, part):
                self._waiting.popleft()
                first.timer.begin()
                self._cached[first.number] = begun[part] = first
        if not begun:
            return None
        longest = max(one.length for one in begun.values())
        return Prefill(begun, self._limits.chunks(longest))

    def _make_room_for_answers(self, running: list[SequenceState]) -> None:
        """Extends the cache for the answers; those that memory has no room for wait again."""
        full = [one for one in running if not self._cache.has_position(one.position)]
        if not full:
            return
        self.batch_version += 1
        if self._cache.extend(max(len(s.request.prompt_tokens) + s.limit for s in full)):
            return
        for one in full:
            self._cache.free(one.number, zero=False)
            del self._cached[one.number]
        self._waiting.extendleft(sorted(full, key=lambda one: one.number, reverse=True))
