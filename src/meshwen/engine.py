# SPDX-License-Identifier: Apache-2.0
"""Requests in, tokens out.

Requests run in batches of a fixed number of rows. Prompts are read in chunks whose lengths come
from a short ladder of buckets, so that few shapes are ever compiled; then every row takes one step
at a time until its request is finished.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

import jax
import numpy as np
from jax import Array

from meshwen.config import Qwen2Config
from meshwen.distributed import to_host
from meshwen.errors import MeshwenError
from meshwen.kv_cache import KVCache
from meshwen.parallel.plan import ParallelPlan
from meshwen.runner import ModelRunner
from meshwen.sampling import Sampled, SamplerRows, SamplingMethod, SamplingParams
from meshwen.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]

_LONGEST_CHUNK = 512
_SMALLEST_BUCKET = 16
# What a device's attention scores, float32 [batch, heads, chunk, slots], may take while a prompt is
# read: with many long prompts the chunks get shorter.
_SCORE_BYTES = 1 << 28


@dataclass(frozen=True)
class Request:
    """A prompt, as token ids, and how to continue it."""

    prompt_tokens: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True)
class Timings:
    """Seconds: from the batch's start to the first token, and from there to the last."""

    time_to_first_token: float
    decode_seconds: float


@dataclass(frozen=True)
class Completion:
    """A finished request.

    Attributes:
        prompt_tokens: the prompt's ids.
        tokens: the answer's ids, an end-of-text token included.
        text: the answer without special tokens, and without the stop string that ended it.
        finish_reason: "stop" at an end-of-text token or stop string, "length" at a limit.
        logprobs: log-probability of each token, when asked for.
        timings: how long it took.
    """

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None
    timings: Timings


@dataclass(frozen=True)
class Event:
    """One token of one request.

    Attributes:
        request: the request's number.
        token: its id.
        text: what can be shown now: whole characters, and nothing that might begin a stop string.
        logprob: of the token, when asked for.
        completion: with a request's last token, the whole answer.
    """

    request: int
    token: int
    text: str
    logprob: float | None
    completion: Completion | None


def check_prompt(token_ids: Sequence[int], config: Qwen2Config, name: str) -> None:
    """Refuses a prompt that the model cannot continue.

    Args:
        token_ids: the prompt.
        config: the model's.
        name: what to call the prompt: "prompt 3".

    Raises:
        MeshwenError: it is empty, or leaves no room in the model's context, or has a token id
            outside the vocabulary.
    """
    length, context = len(token_ids), config.context_length
    if not length:
        raise MeshwenError(f"{name} is empty; give it at least one token")
    if length >= context:
        raise MeshwenError(
            f"{name} has {length} tokens, but the model's context is {context} tokens, the answer "
            "included; shorten it"
        )
    if not all(0 <= token < config.vocab_size for token in token_ids):
        raise MeshwenError(f"{name} has a token id outside the vocabulary of {config.vocab_size}")


class Engine:
    """Runs requests on a model.

    Args:
        runner: the model.
        tokenizer: turns tokens into text; None (a model without one) leaves texts empty.
        eos_token_ids: tokens that end an answer.
        max_batch_size: requests that run at once.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer | None,
        eos_token_ids: Sequence[int],
        max_batch_size: int,
    ):
        self._runner, self._tokenizer = runner, tokenizer
        self._eos = frozenset(eos_token_ids)
        self._max_batch_size = max_batch_size

    @property
    def config(self) -> Qwen2Config:
        """The model's hyperparameters."""
        return self._runner.plan.config

    def run(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Starts requests; every token comes as it is drawn. They are numbered in their order.

        Raises:
            MeshwenError: a prompt is empty, or leaves no room in the model's context.
        """
        for number, request in enumerate(requests, start=1):
            check_prompt(request.prompt_tokens, self._runner.plan.config, f"prompt {number}")
        sequences = [self._sequence(number, request) for number, request in enumerate(requests)]
        size = max(self._max_batch_size, self._runner.plan.data_devices)
        batches = [sequences[first : first + size] for first in range(0, len(sequences), size)]
        return (event for batch in batches for event in self._run_batch(batch))

    def _sequence(self, number: int, request: Request) -> _Sequence:
        room = self._runner.plan.config.context_length - len(request.prompt_tokens)
        limit = min(request.sampling.max_new_tokens, room)
        return _Sequence(number, request, limit, self._tokenizer, self._eos)

    def _run_batch(self, sequences: list[_Sequence]) -> Iterator[Event]:
        started = time.perf_counter()
        batch = _Batch.of(sequences, self._runner.plan)
        hidden, cache = batch.prefill(self._runner)
        positions = batch.lengths
        seen = batch.seen
        sampled = self._runner.first(hidden, positions, batch.rows, seen, batch.method)
        tokens = to_host(sampled.tokens)
        first = time.perf_counter()
        while True:
            yield from _events(sequences, tokens, sampled, first - started, first)
            if all(sequence.finish_reason for sequence in sequences):
                return
            sampled, seen, cache = self._runner.decode(
                cache, tokens, positions, batch.rows, seen, batch.method
            )
            # A finished row stays where it is: it may have no slot left to write to.
            running = np.zeros_like(positions)
            running[: len(sequences)] = [not s.finish_reason for s in sequences]
            positions = positions + running  # Not in place: the step may still be reading it.
            tokens = to_host(sampled.tokens)


def _events(
    sequences: list[_Sequence], tokens: np.ndarray, sampled: Sampled, to_first: float, first: float
) -> Iterator[Event]:
    """The step's tokens of the sequences that are still running."""
    logprobs = None if sampled.logprobs is None else to_host(sampled.logprobs)
    for row, sequence in enumerate(sequences):
        if sequence.finish_reason:
            continue
        wanted = sequence.request.sampling.logprobs and logprobs is not None
        logprob = float(logprobs[row]) if wanted and logprobs is not None else None
        token = int(tokens[row])
        text = sequence.push(token, logprob)
        completion = None
        if sequence.finish_reason:
            timings = Timings(to_first, time.perf_counter() - first)
            completion = sequence.completion(sequence.finish_reason, timings)
        yield Event(sequence.number, token, text, logprob, completion)


@dataclass(frozen=True)
class _Batch:
    """Prompts as arrays, with rows of padding up to a size that the mesh and the buckets like."""

    token_ids: np.ndarray  # int32 [B, sum(chunks)]
    lengths: np.ndarray  # int32 [B]
    chunks: list[int]
    slots: int  # of the cache
    method: SamplingMethod
    rows: SamplerRows
    seen: Array | None  # bool [B, V padded], tokens of the prompts

    @classmethod
    def of(cls, sequences: list[_Sequence], plan: ParallelPlan) -> _Batch:
        """The batch of some sequences."""
        copies = plan.data_devices
        size = copies * _power_of_two(ceil(len(sequences) / copies))
        prompts = [s.request.prompt_tokens for s in sequences]
        lengths = np.ones(size, np.int32)
        lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
        budget = max(len(s.request.prompt_tokens) + s.limit for s in sequences)
        row_bytes = 4 * (size // copies) * plan.heads.local_query_slots * bucket(budget)
        chunks = _chunks(int(lengths.max()), longest=_SCORE_BYTES // row_bytes)
        token_ids = np.zeros((size, sum(chunks)), np.int32)
        for row, prompt in enumerate(prompts):
            token_ids[row, : len(prompt)] = prompt
        # The last chunk is written whole, its padding too.
        needed = max(sum(chunks), budget)
        sampling = [s.request.sampling for s in sequences]
        method = SamplingMethod.of(sampling, plan.config.vocab_size)
        rows = SamplerRows.of(sampling + [SamplingParams()] * (size - len(sampling)))
        seen = _seen(prompts, size, plan) if method.penalize else None
        return cls(token_ids, lengths, chunks, bucket(needed), method, rows, seen)

    def prefill(self, runner: ModelRunner) -> tuple[Array, KVCache]:
        """Reads all prompts: each one's final hidden state [B, D], and the cache."""
        size = len(self.lengths)
        cache, hidden = runner.empty_cache(size, self.slots), runner.empty_hidden(size)
        start = 0
        for length in self.chunks:
            ids = self.token_ids[:, start : start + length]
            # The first chunk sees itself alone; later ones all see the whole cache, so that their
            # number does not multiply what is compiled.
            slots = length if start == 0 else self.slots
            hidden, cache = runner.prefill(cache, hidden, ids, np.int32(start), self.lengths, slots)
            start += length
        return hidden, cache


def _seen(prompts: list[tuple[int, ...]], size: int, plan: ParallelPlan) -> Array:
    seen = np.zeros((size, len(plan.axis_source("vocab"))), bool)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    # Placed as a step returns it: the first step's program then serves all others.
    return jax.device_put(seen, plan.sharding("batch", "vocab"))


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def _chunks(length: int, longest: int) -> list[int]:
    """Bucketed chunks that cover a prompt: whole ones, then the smallest bucket for the rest."""
    chunk = _LONGEST_CHUNK
    while chunk > max(longest, _SMALLEST_BUCKET):
        chunk //= 2
    whole, rest = divmod(length, chunk)
    return [chunk] * whole + ([bucket(rest)] if rest else [])


def bucket(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that is at least `length`."""
    bucket = _SMALLEST_BUCKET
    while bucket < length:
        if bucket * 3 // 2 >= length:
            return bucket * 3 // 2
        bucket *= 2
    return bucket


class _Sequence:
    """One request while it runs."""

    def __init__(
        self,
        number: int,
        request: Request,
        limit: int,
        tokenizer: Tokenizer | None,
        eos: frozenset[int],
    ):
        self.number, self.request, self.limit = number, request, limit
        self.finish_reason: FinishReason | None = None
        self._eos = eos
        self._decoder = tokenizer.stream_decoder() if tokenizer else None
        self._text = StopText(request.sampling.stop)
        self._tokens: list[int] = []
        self._logprobs: list[float] = []

    def push(self, token: int, logprob: float | None) -> str:
        """Takes the next token; returns the text that can be shown, and may finish."""
        self._tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        shown = self._text.push(self._decoder.push(token)) if self._decoder else ""
        if self._text.stopped or token in self._eos:
            self.finish_reason = "stop"
        elif len(self._tokens) == self.limit:
            self.finish_reason = "length"
        if self.finish_reason and self._decoder:
            shown += self._text.push(self._decoder.finish())
            shown += self._text.finish()
            if self._text.stopped:
                self.finish_reason = "stop"
        return shown

    def completion(self, finish_reason: FinishReason, timings: Timings) -> Completion:
        """The finished answer."""
        return Completion(
            self.request.prompt_tokens,
            tuple(self._tokens),
            self._text.shown,
            finish_reason,
            tuple(self._logprobs) if self.request.sampling.logprobs else None,
            timings,
        )


class StopText:
    """Text that ends at the first stop string, and never shows a part of one.

    Attributes:
        shown: all text given out so far.
        stopped: a stop string has come; nothing after it is shown.
    """

    def __init__(self, stop: Sequence[str]):
        self.shown, self.stopped = "", False
        self._stop, self._held = tuple(stop), ""

    def push(self, text: str) -> str:
        """Adds text; returns what can be shown now."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._show(min(found))
        return self._show(len(self._held) - self._possible_stop())

    def finish(self) -> str:
        """Returns what was held back because it might have begun a stop string."""
        return "" if self.stopped else self._show(len(self._held))

    def _show(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self.shown += text
        return text

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max((len(s) - 1 for s in self._stop), default=0))
        for length in range(longest, 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self._stop):
                return length
        return 0
