# SPDX-License-Identifier: Apache-2.0
"""Requests in, tokens out, with continuous batching.

A request waits until one of a fixed number of slots, rows of the KV cache, is free; its prompt is
read into that row while the other rows go on; then every row takes one step at a time, and a row
whose answer ends is given to the next request at once. Shapes are those of the cache, whatever
there is to do: a decode step compiles once for each, and prompts are read in chunks whose lengths
come from a short ladder of buckets.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax import Array

from meshwen.buckets import SMALLEST_BUCKET, bucket, chunks
from meshwen.capacity import Capacity
from meshwen.config import Qwen2Config
from meshwen.distributed import to_host
from meshwen.errors import MeshwenError
from meshwen.kv_cache import KVCache, resized
from meshwen.parallel.plan import ParallelPlan
from meshwen.request import Event, Request, check_prompt
from meshwen.runner import ModelRunner
from meshwen.sampling import Sampled, SamplerRows, SamplingMethod, SamplingParams
from meshwen.sequence import SequenceState
from meshwen.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Chunks of prompts that may be read one after the other while answers wait for their next token.
_MOST_READS = 8
# The most tokens of a step with guesses: with more, to multiply takes longer than to read weights.
_MOST_GUESSED_ROWS = 32


class QueueFullError(MeshwenError):
    """As many requests wait as may."""


class Engine:
    """Runs requests on a model. One thread at a time may call it.

    The cache is made when there is something to do, as large as that needs: rows up to a power of
    two, lengths up to a bucket. While answers run it grows with what waits, within `capacity`; a
    request that there is no memory for waits until they have ended, and none overtakes it.

    Args:
        runner: the model.
        tokenizer: turns tokens into text; None (a model without one) leaves texts empty.
        eos_token_ids: tokens that end an answer.
        capacity: the most slots, and the longest sequence.
        max_waiting: requests that may wait for a slot.
        prompt_lookup_num_tokens: tokens of an answer to guess in a step, 0 to 15, see
            `meshwen.lookup`; where the cache has few rows, and no answer a repetition penalty. They
            only change how fast an answer comes; in fast numerics also its rounding.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer | None,
        eos_token_ids: Sequence[int],
        capacity: Capacity,
        max_waiting: int = 1024,
        prompt_lookup_num_tokens: int = 0,
    ):
        if not 0 <= prompt_lookup_num_tokens < SMALLEST_BUCKET:  # No more than a chunk overwrites.
            raise MeshwenError(
                f"prompt_lookup_num_tokens must be from 0 to {SMALLEST_BUCKET - 1}, "
                f"not {prompt_lookup_num_tokens}"
            )
        self._runner, self._plan, self._tokenizer = runner, runner.plan, tokenizer
        self._eos = frozenset(eos_token_ids)
        self._capacity, self._max_waiting = capacity, max_waiting
        self._guessed = prompt_lookup_num_tokens
        self._submitted = 0
        self._forget()

    def _forget(self) -> None:
        self._waiting: deque[SequenceState] = deque()
        self._slots: list[SequenceState | None] = []
        self._reading: _Reading | None = None
        self._sampler: _Sampler | None = None
        self._cache: KVCache = ()
        self._length = 0  # Slots of the cache.
        self._reads = 0  # Chunks read since answers last got a token.
        self._errors: list[Exception] = []  # That an `on_event` raised in this step.

    @property
    def config(self) -> Qwen2Config:
        """The model's hyperparameters."""
        return self._plan.config

    @property
    def max_model_len(self) -> int:
        """The most tokens of a prompt and its answer."""
        return self._capacity.max_model_len

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._waiting) or any(self._slots)

    def check(self, request: Request, name: str) -> None:
        """Refuses a request that the engine cannot answer.

        Args:
            request: the request.
            name: what to call its prompt: "prompt 3".

        Raises:
            MeshwenError: the prompt is empty, too long, or has a token outside the vocabulary, or
                there is no memory for it and its answer.
        """
        check_prompt(request.prompt_tokens, self.config, name, self._capacity.max_model_len)
        self._capacity.rows(1, bucket(self._needed(request)))

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> int:
        """Takes a request; `step` then gives its tokens to `on_event`, one event each.

        Returns:
            The request's number.

        Raises:
            QueueFullError: too many requests wait.
            MeshwenError: `check` refuses the request.
        """
        self.check(request, "the prompt")
        if len(self._waiting) >= self._max_waiting:
            raise QueueFullError(f"{self._max_waiting} requests wait already; try again later")
        return self._append(request, on_event)

    def _append(self, request: Request, on_event: Callable[[Event], None]) -> int:
        number, self._submitted = self._submitted, self._submitted + 1
        limit = self._limit(request)
        self._waiting.append(
            SequenceState(number, request, limit, self._tokenizer, self._eos, on_event)
        )
        return number

    def cancel(self, number: int) -> None:
        """Drops a request, waiting or running; its slot is free at once. No event tells of it."""
        self._waiting = deque(s for s in self._waiting if s.number != number)
        self._slots = [None if s and s.number == number else s for s in self._slots]
        if self._reading is not None:
            self._reading = self._reading.without(number)
        self._sampler = None

    def step(self) -> None:
        """Reads a chunk of a waiting prompt if a slot is free, then takes a step of each answer.

        While less than half of the slots answer, a few prompts are read first: a step of few
        answers costs almost what one of many does.

        Raises:
            Exception: an `on_event` raised it; its request is cancelled, others go on. Any other
                error ends all requests without an event; the engine is then as new.
        """
        try:
            self._make_room()
            self._reads = self._reads + 1 if self._read_chunk() else _MOST_READS
            running = sum(s is not None and bool(s.tokens) for s in self._slots)
            if running and (2 * running >= len(self._slots) or self._reads >= _MOST_READS):
                self._reads = 0
                self._decode()
        except BaseException:
            self._forget()  # A step that broke off has taken the cache with it.
            raise
        errors, self._errors = self._errors, []
        if errors:
            raise errors[0]

    def run(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Runs requests; every token comes as it is drawn. They are numbered in their order.

        Closing the iterator cancels what is unfinished. However many they are, they may all wait.

        Raises:
            MeshwenError: `check` refuses one of them; none is run.
        """
        for number, request in enumerate(requests, start=1):
            self.check(request, f"prompt {number}")
        return self._run(requests)

    def _run(self, requests: Sequence[Request]) -> Iterator[Event]:
        came: deque[Event] = deque()
        # The engine's, of unfinished requests, to the caller's.
        numbers = {self._append(one, came.append): n for n, one in enumerate(requests)}
        try:
            while numbers:
                self.step()
                if not came and not self.busy:
                    raise MeshwenError("these requests were lost when a step of others failed")
                while came:
                    event = came.popleft()
                    number = numbers[event.request]
                    if event.completion:
                        del numbers[event.request]
                    yield replace(event, request=number)
        finally:
            for number in numbers:
                self.cancel(number)

    def _limit(self, request: Request) -> int:
        """Tokens that the answer may have."""
        room = self._capacity.max_model_len - len(request.prompt_tokens)
        return min(request.sampling.max_new_tokens, room)

    def _needed(self, request: Request) -> int:
        """Slots of the cache that a request needs: its chunks are written whole."""
        length = len(request.prompt_tokens)
        return max(sum(self._chunks(length)), length + self._limit(request))

    def _chunks(self, length: int) -> list[int]:
        return chunks(length, self._plan.heads.local_query_slots)

    def _make_room(self) -> None:
        """Fits the cache to what waits, as far as memory and what is running allow."""
        if not self._waiting:
            return
        active = sum(slot is not None for slot in self._slots)
        wanted = active + len(self._waiting)
        if not active:
            length = bucket(max(self._needed(one.request) for one in self._waiting))
            self._make_cache(self._capacity.rows(wanted, length), length)
            return
        old = len(self._slots), self._length
        length = max(self._length, bucket(self._needed(self._waiting[0].request)))
        rows = max(old[0], self._capacity.rows(wanted, length))
        for new in ((rows, length), (old[0], length)):
            if new != old and self._capacity.holds(old, new):  # Both exist for a moment.
                self._cache = resized(self._cache, self._plan, *new)
                self._slots = _more_rows(self._slots, new[0], self._plan.data_devices)
                self._length, self._sampler = length, None
                return

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
                "only %d sequences of %d tokens fit the memory for the KV cache, not %d at once",
                rows,
                length,
                wanted,
            )

    def _fits(self, sequence: SequenceState) -> bool:
        return self._needed(sequence.request) <= self._length

    def _begin_reading(self) -> _Reading | None:
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
        longest = max(len(s.request.prompt_tokens) for _, s in taken.values())
        return _Reading.of(taken, parts, self._chunks(longest), self._runner)

    def _read_chunk(self) -> bool:
        """Reads a chunk of prompts; false where no prompt waits, or no slot is free for it."""
        reading = self._reading = self._reading or self._begin_reading()
        if reading is None:
            return False
        self._cache = reading.read(self._runner, self._cache)
        if not reading.chunks:
            self._reading = self._sampler = None
            sampled = reading.first(self._runner, self._plan)
            self._push(reading.sequences, sampled, {})
        return True

    def _decode(self) -> None:
        """Takes a step of every answer."""
        running = {row: s for row, s in enumerate(self._slots) if s is not None and s.tokens}
        sampler = self._sampler or _Sampler.of(running, len(self._slots), self._plan)
        guesses = {} if sampler.method.penalize else self._guesses(running)
        tokens = np.zeros((len(self._slots), 1 + (self._guessed if guesses else 0)), np.int32)
        positions = np.zeros(len(self._slots), np.int32)
        if self._reading:  # The step writes to every row: here, what the next chunk overwrites.
            positions[:] = self._reading.start
        for row, sequence in running.items():
            tokens[row, 0], positions[row] = sequence.tokens[-1], sequence.position
            tokens[row, 1:] = guesses.get(row, 0)
        sampled, seen, self._cache = self._runner.decode(
            self._cache, tokens, positions, sampler.rows, sampler.seen, sampler.method
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
                if not any(s is sequence for s in self._slots):
                    break  # It has ended, or was cancelled.
                logprob = float(logprobs[row, i]) if logprobs is not None else None
                self._push_one(sequence, int(tokens[row, i]), logprob)

    def _push_one(self, sequence: SequenceState, token: int, logprob: float | None) -> None:
        wanted = sequence.request.sampling.logprobs
        try:
            sequence.push(token, logprob if wanted else None)
        except Exception as error:
            self._errors.append(error)
            self.cancel(sequence.number)
        if sequence.finish_reason:
            self.cancel(sequence.number)


def _more_rows(
    slots: list[SequenceState | None], rows: int, parts: int
) -> list[SequenceState | None]:
    """The slots as `resized` lays them out."""
    old, new = len(slots) // parts, rows // parts
    added: list[SequenceState | None] = [None] * (new - old)
    return [s for part in range(parts) for s in (*slots[part * old : (part + 1) * old], *added)]


@dataclass
class _Reading:
    """Prompts that are being read, at most one on each part of the batch."""

    sequences: dict[int, SequenceState]  # by part
    token_ids: np.ndarray  # int32 [P, sum(chunks)]
    rows: np.ndarray  # int32 [P], of the part
    lengths: np.ndarray  # int32 [P], 0 where there is none
    chunks: list[int]  # that are still to be read
    hidden: Array  # float32 [P, D]
    start: int = 0  # of the next chunk

    @classmethod
    def of(
        cls,
        taken: Mapping[int, tuple[int, SequenceState]],
        parts: int,
        chunks: list[int],
        runner: ModelRunner,
    ) -> _Reading:
        """Of each part, the row and the sequence that it takes."""
        token_ids = np.zeros((parts, sum(chunks)), np.int32)
        rows, lengths = (np.zeros(parts, np.int32) for _ in range(2))
        sequences = {part: sequence for part, (_, sequence) in taken.items()}
        for part, (row, sequence) in taken.items():
            prompt = sequence.request.prompt_tokens
            token_ids[part, : len(prompt)] = prompt
            rows[part], lengths[part] = row, len(prompt)
        return cls(sequences, token_ids, rows, lengths, list(chunks), runner.empty_hidden(parts))

    def without(self, number: int) -> _Reading | None:
        """What is left when a request is dropped; None where nothing is."""
        left = {part: s for part, s in self.sequences.items() if s.number != number}
        lengths = [n if part in left else 0 for part, n in enumerate(self.lengths)]
        return replace(self, sequences=left, lengths=np.array(lengths, np.int32)) if left else None

    def read(self, runner: ModelRunner, cache: KVCache) -> KVCache:
        """Reads the next chunk into the cache, which is donated."""
        length = self.chunks.pop(0)
        end = self.start + length
        # The first chunk sees itself alone, later ones the filled part of the cache.
        slots = bucket(end) if self.start else length
        ids, start = self.token_ids[:, self.start : end], np.int32(self.start)
        self.hidden, cache = runner.prefill(
            cache, self.hidden, ids, self.rows, start, self.lengths, slots
        )
        self.start = end
        return cache

    def first(self, runner: ModelRunner, plan: ParallelPlan) -> Sampled:
        """The first token of each answer."""
        sampler = _Sampler.of(self.sequences, len(self.lengths), plan)
        return runner.first(self.hidden, self.lengths, sampler.rows, sampler.seen, sampler.method)


@dataclass(frozen=True)
class _Sampler:
    """What the sampler is told of the sequences in some rows."""

    method: SamplingMethod
    rows: SamplerRows
    seen: Array | None  # bool [B, V padded], tokens of prompts and answers

    @classmethod
    def of(cls, running: Mapping[int, SequenceState], size: int, plan: ParallelPlan) -> _Sampler:
        """Of sequences by row, among `size` rows."""
        asked = {row: sequence.request.sampling for row, sequence in running.items()}
        method = SamplingMethod.of(list(asked.values()), plan.config.vocab_size)
        rows = SamplerRows.of([asked.get(row, SamplingParams()) for row in range(size)])
        if not method.penalize:
            return cls(method, rows, None)
        seen = np.zeros((size, len(plan.axis_source("vocab"))), bool)
        for row, sequence in running.items():
            seen[row, [*sequence.request.prompt_tokens, *sequence.tokens]] = True
        # Placed as a step returns it: the first step's program then serves all others.
        return cls(method, rows, jax.device_put(seen, plan.sharding("batch", "vocab")))
