# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: which request has which row of the cache, and what each step computes.

A request waits until one of a fixed number of slots, rows of the KV cache, is free; its prompt is
read into that row while the other rows go on; then every row takes one step at a time, and a row
whose answer ends is given to the next request at once. Shapes are those of the cache, whatever
there is to do: a decode step compiles once for each, and prompts are read in chunks whose lengths
come from a short ladder of buckets.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace

import jax
import numpy as np

from meshwen.cache.budget import Capacity
from meshwen.cache.kv_cache import KVCache
from meshwen.engine.batch_sampler import BatchSampler
from meshwen.engine.prefill import Prefill
from meshwen.engine.request import Request
from meshwen.engine.runner import ModelRunner
from meshwen.engine.sampling import Sampled
from meshwen.engine.sequence import SequenceState
from meshwen.parallel.distributed import to_host
from meshwen.runtime.shape_buckets import bucket, chunks

logger = logging.getLogger(__name__)

# Chunks of prompts that may be read one after the other while answers wait for their next token.
_MOST_READS = 8
# The most tokens of a step with guesses: with more, to multiply takes longer than to read weights.
_MOST_GUESSED_ROWS = 32
# Tokens of an answer that the cache has room for before they come; for more it grows with them.
_AHEAD = 256


class Scheduler:
    """Steps a model's requests, for one thread at a time: `meshwen.engine.engine` is for several.

    The cache is made when there is something to do, as large as that needs: rows up to a power of
    two, lengths up to a bucket. While answers run it grows with what waits and with them, within
    `capacity`; a request that there is no memory for waits until they have ended, and none
    overtakes it. So does an answer that the cache cannot grow for: what there is of it is read
    again like a prompt.

    Args:
        runner: the model.
        capacity: the most slots, and the longest sequence.
        prompt_lookup_num_tokens: tokens of an answer to guess in a step, see
            `meshwen.engine.prompt_lookup`.

    Attributes:
        telling: the request whose `on_event` is running; None between those.
    """

    def __init__(self, runner: ModelRunner, capacity: Capacity, prompt_lookup_num_tokens: int = 0):
        self._runner, self._plan, self._capacity = runner, runner.plan, capacity
        self._guessed = prompt_lookup_num_tokens
        self._told = False
        self.forget()

    def forget(self) -> None:
        """Drops all requests and the cache."""
        self._waiting: deque[SequenceState] = deque()
        self._slots: list[SequenceState | None] = []
        self._reading: Prefill | None = None
        self._sampler: BatchSampler | None = None
        self._cache: KVCache = ()
        self._length = 0  # Slots of the cache.
        self._reads = 0  # Chunks read since answers last got a token.
        self._errors: list[tuple[int, Exception]] = []  # That an `on_event` raised.
        self.telling: int | None = None

    def add(self, sequences: Iterable[SequenceState]) -> None:
        """Lets sequences wait for a slot."""
        self._waiting.extend(sequences)

    def drop_ended(self) -> None:
        """Frees what finished and cancelled sequences have."""
        self._waiting = deque(s for s in self._waiting if not s.ended)
        self._free_slots()

    @property
    def prefilled(self) -> tuple[int, int] | None:
        """Tokens read of the prompt that is being read, and of how many; None: none is."""
        reading = self._reading
        if reading is None:
            return None
        longest = int(reading.lengths.max())
        return min(reading.start, longest), longest

    def step(self) -> None:
        """Reads a chunk of a waiting prompt if a slot is free, then takes a step of each answer.

        While less than half of the slots answer, a few prompts are read first: a step of few
        answers costs almost what one of many does.

        Raises:
            BaseException: the step broke off and has taken the cache with it: call `forget`.
        """
        self._make_room()
        self._reads = self._reads + 1 if self._read_chunk() else _MOST_READS
        running = len(self._running())
        if running and (2 * running >= len(self._slots) or self._reads >= _MOST_READS):
            self._reads = 0
            self._make_room_for_answers()
            self._decode()

    def take_errors(self) -> list[tuple[int, Exception]]:
        """What the `on_event` of requests raised since this was asked; these are cancelled.

        Returns:
            Their numbers, each with what was raised.
        """
        errors, self._errors = self._errors, []
        return errors

    def limit(self, request: Request) -> int:
        """Tokens that the answer may have."""
        allowed = self._allowed(request)
        if request.sampling.max_new_tokens_asked:
            return allowed
        return min(allowed, self._capacity.longest - len(request.prompt_tokens))

    def _allowed(self, request: Request) -> int:
        """Tokens that the answer may have where memory suffices."""
        asked, longest = request.sampling, self._capacity.max_model_len
        if asked.max_length is not None:
            longest = min(longest, asked.max_length)
        return min(asked.max_new_tokens, longest - len(request.prompt_tokens))

    def check_memory(self, request: Request) -> None:
        """Refuses a request that there is no memory for.

        Raises:
            MeshwenError: the cache would be too long for even one sequence.
        """
        length = len(request.prompt_tokens)
        answer = max(self.limit(request), 1)
        self._capacity.rows(1, bucket(max(sum(self._chunks(length)), length + answer)))

    def _needed(self, sequence: SequenceState) -> int:
        """Slots of the cache that a sequence needs to begin: its chunks are written whole."""
        length = len(sequence.token_ids)
        answer = min(sequence.limit - len(sequence.tokens), _AHEAD)
        return max(sum(self._chunks(length)), length + answer)

    def _running(self) -> dict[int, SequenceState]:
        """By row, the sequences that a step gives a token to."""
        read = self._reading.sequences.values() if self._reading else ()
        return {r: s for r, s in enumerate(self._slots) if s and s.tokens and s not in read}

    def _chunks(self, length: int) -> list[int]:
        return chunks(length, self._plan.heads.local_query_slots)

    def _make_room(self) -> None:
        """Fits the cache to what waits, as far as memory and what is running allow."""
        if not self._waiting:
            return
        active = sum(slot is not None for slot in self._slots)
        wanted = active + len(self._waiting)
        if not active:
            length = bucket(max(self._needed(one) for one in self._waiting))
            self._make_cache(self._capacity.rows(wanted, length), length)
            return
        old = len(self._slots), self._length
        length = max(self._length, bucket(self._needed(self._waiting[0])))
        rows = max(old[0], self._capacity.rows(wanted, length))
        for new in ((rows, length), (old[0], length)):
            if self._grow(*new):
                return

    def _make_room_for_answers(self) -> None:
        """Fits the cache to the answers; those that memory has no room for wait."""
        full = [s for s in self._running().values() if s.position >= self._length]
        if not full:
            return
        rows, old = len(self._slots), self._length
        longest = bucket(max(len(s.request.prompt_tokens) + s.limit for s in full))
        # Twice as long, so that it is copied rarely.
        if not (self._grow(rows, min(2 * old, longest)) or self._grow(rows, bucket(old + 1))):
            self._slots = [None if s in full else s for s in self._slots]
            self._waiting.extendleft(sorted(full, key=lambda s: s.number, reverse=True))
            self._sampler = None

    def _grow(self, rows: int, length: int) -> bool:
        """Makes the cache larger, if there is memory for that."""
        old, new = (len(self._slots), self._length), (rows, length)
        if new == old or not self._capacity.holds(old, new):  # Both exist for a moment.
            return False
        self._cache = self._runner.resized(self._cache, *new)
        self._slots = _more_rows(self._slots, rows, self._plan.data_devices)
        self._length, self._sampler = length, None
        return True

    def _make_cache(self, rows: int, length: int) -> None:
        """An empty cache, for an engine that nothing runs on."""
        if (rows, length) == (len(self._slots), self._length):
            return
        self._cache, self._sampler = (), None  # Free before the next is made.
        self._cache = self._runner.empty_cache(rows, length)
        self._slots, self._length = [None] * rows, length
        wanted = min(self._capacity.max_num_seqs, len(self._waiting))
        if rows < wanted:
            logger.warning(
                "the memory for the KV cache has room for %d of %d sequences of %d tokens at once",
                rows,
                wanted,
                length,
            )

    def _fits(self, sequence: SequenceState) -> bool:
        return self._needed(sequence) <= self._length

    def _begin_reading(self) -> Prefill | None:
        """Gives the requests that wait longest free slots, one on each part of the batch."""
        parts = self._plan.data_devices
        of_part = len(self._slots) // parts
        taken: dict[int, tuple[int, SequenceState]] = {}
        for part in range(parts):
            first = part * of_part
            free = [r for r in range(of_part) if self._slots[first + r] is None]
            if free and self._waiting and self._fits(self._waiting[0]):
                sequence = self._waiting.popleft()
                sequence.begin()
                self._slots[first + free[0]] = sequence
                taken[part] = free[0], sequence
        if not taken:
            return None
        longest = max(len(s.token_ids) for _, s in taken.values())
        return Prefill.of(taken, parts, self._chunks(longest), self._runner)

    def _read_chunk(self) -> bool:
        """Reads a chunk of prompts; false where no prompt waits, or no slot is free for it."""
        reading = self._reading = self._reading or self._begin_reading()
        if reading is None:
            return False
        self._cache = reading.read(self._runner, self._cache)
        if reading.chunks:
            # Whoever waits for the end of a step, as Ctrl-C does, waits for one chunk, not for all.
            jax.block_until_ready(reading.hidden)
        else:
            self._reading = self._sampler = None
            sampled = reading.first(self._runner, self._plan)
            self._push(reading.sequences, sampled, {})
        return True

    def _decode(self) -> None:
        """Takes a step of every answer."""
        running = self._running()
        if not running:
            return
        sampler = self._sampler or BatchSampler.of(running, len(self._slots), self._plan)
        # Each draft would need masks of its own.
        one_by_one = sampler.method.penalize or sampler.constrained
        guesses = {} if one_by_one else self._guesses(running)
        tokens = np.zeros((len(self._slots), 1 + (self._guessed if guesses else 0)), np.int32)
        positions = np.zeros(len(self._slots), np.int32)
        if self._reading:  # The step writes to every row: here, what the next chunk overwrites.
            positions[:] = self._reading.start
        for row, sequence in running.items():
            tokens[row, 0], positions[row] = sequence.tokens[-1], sequence.position
            tokens[row, 1:] = guesses.get(row, 0)
        sampled, seen, self._cache = self._runner.decode(
            self._cache, tokens, positions, sampler.now(running), sampler.seen, sampler.method
        )
        self._sampler = replace(sampler, seen=seen)
        self._push(running, sampled, guesses)

    def _guesses(self, running: Mapping[int, SequenceState]) -> dict[int, list[int]]:
        """By row, what may follow; nothing where a step of so many tokens would cost too much.

        Nor where a row has no room for them: a step writes equally many tokens of every row.
        """
        tokens = len(self._slots) * (1 + self._guessed)
        last = max((sequence.position for sequence in running.values()), default=0) + self._guessed
        if not self._guessed or tokens > _MOST_GUESSED_ROWS or last >= self._length:
            return {}
        found = {row: sequence.guesses(self._guessed) for row, sequence in running.items()}
        return {row: tokens for row, tokens in found.items() if tokens}

    def _push(
        self,
        sequences: Mapping[int, SequenceState],
        sampled: Sampled,
        guesses: Mapping[int, list[int]],
    ) -> None:
        """Gives sequences the tokens of their rows, as far as what they follow was right."""
        size = len(sampled.tokens)
        tokens = to_host(sampled.tokens).reshape(size, -1)
        logprobs = None if sampled.logprobs is None else to_host(sampled.logprobs).reshape(size, -1)
        for row, sequence in sequences.items():
            guessed = guesses.get(row, [])
            right = next((i for i, t in enumerate(guessed) if t != tokens[row, i]), len(guessed))
            if guessed:
                sequence.judge(right)
            for i in range(1 + right):
                if sequence.ended:
                    break
                logprob = float(logprobs[row, i]) if logprobs is not None else None
                self._push_one(sequence, int(tokens[row, i]), logprob)
        self._free_slots()

    def _push_one(self, sequence: SequenceState, token: int, logprob: float | None) -> None:
        wanted = sequence.request.sampling.logprobs
        self.telling = sequence.number
        try:
            sequence.push(token, logprob if wanted else None)
        except Exception as error:
            self._errors.append((sequence.number, error))
            sequence.cancelled = True
        self.telling = None
        if sequence.finish_reason == "length" and not self._told:
            self._tell_of_memory(sequence)

    def _tell_of_memory(self, sequence: SequenceState) -> None:
        """Says once that answers end where memory does."""
        allowed = self._allowed(sequence.request)
        if len(sequence.tokens) < allowed:
            self._told = True
            logger.warning(
                "an answer ended after %d of the %d tokens that the model's defaults allow it: "
                "there is no memory for a KV cache of more than %d, the prompt's included; use "
                "more devices",
                len(sequence.tokens),
                allowed,
                len(sequence.token_ids),
            )

    def _free_slots(self) -> None:
        ended = {s.number for s in self._slots if s and s.ended}
        if not ended:
            return
        for row, one in enumerate(self._slots):
            # NaN must not reach the next in the row; of a cancelled one it is not known.
            if one and one.ended and one.finish_reason not in ("stop", "length"):
                self._cache = self._runner.without_row(self._cache, row)
        self._slots = [None if s and s.number in ended else s for s in self._slots]
        if self._reading is not None:
            self._reading = self._reading.without(ended)
        self._sampler = None


def _more_rows(
    slots: list[SequenceState | None], rows: int, parts: int
) -> list[SequenceState | None]:
    """The slots as `ModelRunner.resized` lays them out."""
    old, new = len(slots) // parts, rows // parts
    added: list[SequenceState | None] = [None] * (new - old)
    return [s for part in range(parts) for s in (*slots[part * old : (part + 1) * old], *added)]
