# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: who waits, who has KV blocks, and what each step computes.

A step has a budget of tokens. Sequences that only lack what follows their newest token come first,
one token each; the rest goes to prompts, in chunks. A request waits until there are a row and
blocks for its prompt; none overtakes. Where blocks run out, the newest sequence gives its own back,
and is computed again when there is room: its prompt and its answer so far, as a prompt.

This is policy alone: it computes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from math import ceil

from meshwen.cache.block_manager import BlockManager
from meshwen.engine.sequence import SequenceState
from meshwen.engine.step_plan import Chunk, StepPlan


class Scheduler:
    """Decides what the next step computes; for one thread at a time.

    Args:
        blocks: gives KV blocks to sequences.
        parts: of the batch, each with its own blocks.
        max_num_seqs: the most sequences that have rows at once.
        max_num_batched_tokens: the most tokens of a step, without drafts.

    Attributes:
        batch_version: counts the changes of what is in which row.
        preemptions: how often a sequence gave its blocks back.
    """

    def __init__(
        self, blocks: BlockManager, parts: int, max_num_seqs: int, max_num_batched_tokens: int
    ):
        self._blocks, self._parts = blocks, parts
        self._most_rows = ceil(max_num_seqs / parts)
        self._budget = ceil(max_num_batched_tokens / parts)
        self.batch_version = self.preemptions = 0
        self.clear()

    def clear(self) -> None:
        """Forgets all sequences."""
        self._waiting: deque[SequenceState] = deque()
        self._running: list[list[SequenceState]] = [[] for _ in range(self._parts)]
        self._blocks.clear()
        self.batch_version += 1

    def add(self, sequences: Iterable[SequenceState]) -> None:
        """Lets sequences wait."""
        self._waiting.extend(sequences)

    @property
    def prefilled(self) -> tuple[int, int] | None:
        """Tokens done of the prompt that has been prefilled longest, and of how many."""
        for one in self._all_running():
            if one.computed < one.length - 1 or not one.tokens:
                return one.computed, one.length
        return None

    def rows(self) -> Iterator[tuple[int, int, SequenceState]]:
        """Part, row and sequence of all that have rows."""
        for part, running in enumerate(self._running):
            for row, one in enumerate(running):
                yield part, row, one

    def schedule(self) -> StepPlan:
        """What the next step computes: nothing where there is nothing to do.

        Sequences count as computed what is in the step; the caller computes it.
        """
        for part in range(self._parts):
            self._make_room_to_decode(part)
        chunks: dict[int, Chunk] = {}  # By sequence.
        left = [self._budget] * self._parts
        for part, _, one in self.rows():
            if one.length - one.computed == 1:
                left[part] -= 1
                chunks[one.number] = self._chunk(one, 1)
        for part, _, one in self.rows():
            if one.number not in chunks and left[part] > 0:
                chunks[one.number] = self._chunk(one, left[part])
                left[part] -= chunks[one.number].count
        copies: list[list[tuple[int, int]]] = [[] for _ in self._running]
        for one in self._all_running():
            self._begin_siblings(one, chunks, copies)
        while (begun := self._begin_next(left)) is not None:
            part, one = begun
            chunks[one.number] = self._chunk(one, left[part])
            left[part] -= chunks[one.number].count
            self._begin_siblings(one, chunks, copies)
        return self._plan(chunks, copies)

    def release_ended(self) -> None:
        """Frees rows and blocks of sequences that have ended."""
        for running in self._running:
            ended = [one for one in running if one.ended]  # Any thread may cancel more of them.
            for one in ended:
                self._blocks.free(one.number)
            if ended:
                running[:] = [one for one in running if one not in ended]
                self.batch_version += 1

    def drop_cancelled(self) -> None:
        """Forgets sequences that were cancelled, waiting or not."""
        self._waiting = deque(one for one in self._waiting if not one.ended)
        self.release_ended()

    def _all_running(self) -> list[SequenceState]:
        return sorted((one for _, _, one in self.rows()), key=lambda one: one.number)

    def _make_room_to_decode(self, part: int) -> None:
        """Gives each sequence a block for its newest token, the newest sequences' if need be."""
        running, served = self._running[part], 0
        while served < len(running):
            one = running[served]
            if self._blocks.extend(one.number, one.length):
                served += 1
            else:
                self._preempt(running.pop())

    def _preempt(self, one: SequenceState) -> None:
        """Lets a sequence that has lost its row wait again, before all others."""
        self._blocks.free(one.number)
        one.computed = 0
        self._waiting.appendleft(one)
        self.batch_version += 1
        self.preemptions += 1

    def _begin_next(self, left: list[int]) -> tuple[int, SequenceState] | None:
        """Gives the sequence that has waited longest a row; None where there is none for it."""
        # A block for the next token of all in the part, so that it need not give way at once.
        parts = {
            part: len(running)
            for part, running in enumerate(self._running)
            if left[part] > 0 and len(running) < self._most_rows
        }
        if not self._waiting or not parts:
            return None
        one = self._waiting[0]
        placed = self._blocks.begin(
            one.number,
            one.token_ids,
            one.request.salt,
            # Log-probabilities of a prompt follow from all of it.
            use_cached=one.prompt_logprobs is None or one.prompt_logprobs.is_complete,
            parts=parts,
            digests=one.digests,
        )
        if placed is None:
            return None
        self._waiting.popleft()
        one.begin(placed.cached_tokens)
        self._running[placed.part].append(one)
        self.batch_version += 1
        return placed.part, one

    def _begin_siblings(
        self, one: SequenceState, chunks: dict[int, Chunk], copies: list[list[tuple[int, int]]]
    ) -> None:
        """Begins the other answers to a prompt that is in the cache after this step.

        They share its blocks, but for a last one that is not full, of which each gets a copy.
        Those that there is no row or block for wait, before all others.
        """
        if not one.siblings or one.number not in chunks or not chunks[one.number].samples:
            return
        part, length = self._blocks.part(one.number), one.length
        running, after = self._running[part], self._running[part].index(one)
        waiting, one.siblings = one.siblings, []
        for sibling in waiting:
            sibling.prompt_logprobs = one.prompt_logprobs
        while waiting and len(running) < self._most_rows:
            copied = self._blocks.fork(one.number, waiting[0].number, length)
            if copied is None:
                break
            sibling = waiting.pop(0)
            sibling.begin(one.cached_tokens)
            sibling.computed = length
            running.append(sibling)
            copies[part] += copied
            chunks[sibling.number] = Chunk(sibling, 0, length, 0, after=after)
            self.batch_version += 1
        self._waiting.extendleft(reversed(waiting))

    def _chunk(self, one: SequenceState, most: int) -> Chunk:
        """The next tokens of a sequence, which count as computed from now on."""
        start, count = one.computed, min(most, one.length - one.computed)
        one.computed = start + count
        self._blocks.computed(one.number, one.token_ids, one.computed)
        return Chunk(one, 0, start, count)

    def _plan(self, chunks: dict[int, Chunk], copies: list[list[tuple[int, int]]]) -> StepPlan:
        plan = StepPlan([[] for _ in self._running], most_rows=self._most_rows, copies=copies)
        plan.rows = max(map(len, self._running))
        for part, row, one in self.rows():
            if (chunk := chunks.get(one.number)) is not None:
                chunk.row = row
                plan.chunks[part].append(chunk)
                plan.prefills |= chunk.count != 1 or not chunk.samples
        return plan
