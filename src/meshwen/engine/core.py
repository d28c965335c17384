# SPDX-License-Identifier: Apache-2.0
"""The step loop: the scheduler's decisions, computed on the model and delivered."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import jax
import numpy as np
from jax import Array

from meshwen.cache.budget import CacheBudget
from meshwen.cache.manager import CacheManager
from meshwen.engine.batch_sampler import BatchSampler
from meshwen.engine.delivery import Delivery
from meshwen.engine.fetched_tokens import FetchedTokens
from meshwen.engine.limits import SequenceLimits
from meshwen.engine.prefill import Prefill
from meshwen.engine.runner import ModelRunner
from meshwen.engine.sampling import Sampled
from meshwen.engine.scheduler import Scheduler
from meshwen.engine.sequence import SequenceState
from meshwen.engine.speculation import Speculation

logger = logging.getLogger(__name__)


class EngineCore:
    """Steps a model's sequences, for one thread at a time: `meshwen.engine.engine` is for several.

    Shapes are those of the cache, whatever there is to do, and prompts are prefilled in chunks
    whose lengths are shape buckets: `meshwen.engine.runner` says what is compiled for each.

    Args:
        runner: the model.
        budget: what the cache may hold.
        speculation: when steps have draft tokens.

    Attributes:
        limits: how long sequences may become.
        cache: the KV cache.
        scheduler: decides what each step computes.
        delivery: gives tokens to those who asked.
    """

    def __init__(self, runner: ModelRunner, budget: CacheBudget, speculation: Speculation):
        self.runner, self.speculation = runner, speculation
        self.limits = SequenceLimits(budget, runner.score_heads)
        self.cache = CacheManager(runner, budget)
        self.scheduler = Scheduler(self.cache, self.limits, budget.parts)
        self.delivery = Delivery()
        self._parts = budget.parts
        self._hidden: Array | None = None  # Of the prefill under way, float32 [P, D].
        self._sampler: tuple[int, BatchSampler] | None = None  # With its batch version.
        self._warned_of_memory = False

    def clear(self) -> None:
        """Drops all sequences and the cache, as after a step that broke off."""
        self.cache.clear()
        self.scheduler.clear()
        self.delivery.clear()
        self.speculation.clear()
        self._hidden = self._sampler = None

    def step(self, new: Iterable[SequenceState] = (), *, drop_cancelled: bool = False) -> None:
        """Computes a chunk of a prompt if one waits, then a token of each answer.

        Args:
            new: sequences that are to wait first.
            drop_cancelled: some sequences were cancelled since the last step.

        Raises:
            BaseException: the step broke off and has taken the cache with it: call `clear`.
        """
        self.scheduler.add(new)
        if drop_cancelled:
            self.scheduler.drop_cancelled()
        prefill = self.scheduler.next_chunk()
        if prefill is not None:
            self._compute_chunk(prefill)
        sequences = self.scheduler.next_decode()
        if sequences:
            self._decode(sequences)
        self.speculation.forget_ended()

    def _compute_chunk(self, prefill: Prefill) -> None:
        if not prefill.done:
            self._hidden = self.runner.empty_hidden(self._parts)
        assert self._hidden is not None
        rows = self.cache.prefill_rows({p: one.number for p, one in prefill.sequences.items()})
        self._hidden, self.cache.arrays = self.runner.prefill(
            self.cache.arrays, self._hidden, *prefill.inputs(rows)
        )
        if not self.scheduler.chunk_done():
            # Whoever waits for the end of a step, as Ctrl-C does, waits for one chunk, not for all.
            jax.block_until_ready(self._hidden)
            return
        sequences = prefill.sequences
        sampler = BatchSampler.of(sequences, self._parts, self.runner.plan)
        sampled = self.runner.first(
            self._hidden,
            prefill.lengths(self._parts),
            sampler.rows_of_step(sequences),
            sampler.penalized,
            sampler.method,
        )
        self._deliver(sequences, sampled, {})

    def _decode(self, sequences: Mapping[int, SequenceState]) -> None:
        """Takes a step of every answer, by row."""
        sampler = self._batch_sampler(sequences)
        drafts = self.speculation.drafts(
            sequences, self.cache.batch_size, self.cache.has_position, sampler
        )
        tokens, positions = self._decode_inputs(sequences, drafts)
        sampled, penalized, self.cache.arrays = self.runner.decode(
            self.cache.arrays,
            tokens,
            positions,
            sampler.rows_of_step(sequences),
            sampler.penalized,
            sampler.method,
        )
        self._sampler = self.scheduler.batch_version, replace(sampler, penalized=penalized)
        self._deliver(sequences, sampled, drafts)

    def _batch_sampler(self, sequences: Mapping[int, SequenceState]) -> BatchSampler:
        """That of the last step, unless what runs in which row has changed since."""
        if self._sampler and self._sampler[0] == self.scheduler.batch_version:
            return self._sampler[1]
        return BatchSampler.of(sequences, self.cache.batch_size, self.runner.plan)

    def _decode_inputs(
        self, sequences: Mapping[int, SequenceState], drafts: Mapping[int, Sequence[int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, int32 [B, 1 + drafts], and the positions of the first of each, int32 [B]."""
        rows, count = self.cache.batch_size, self.speculation.num_tokens if drafts else 0
        tokens, positions = np.zeros((rows, 1 + count), np.int32), np.zeros(rows, np.int32)
        if prefill := self.scheduler.prefill:
            # The step writes to every row: here, what the next chunk overwrites.
            positions[:] = prefill.start
        for row, sequence in sequences.items():
            drafted = drafts.get(row, ())
            tokens[row, 0], positions[row] = sequence.tokens[-1], sequence.position
            tokens[row, 1 : 1 + len(drafted)] = drafted
        return tokens, positions

    def _deliver(
        self,
        sequences: Mapping[int, SequenceState],
        sampled: Sampled,
        drafts: Mapping[int, Sequence[int]],
    ) -> None:
        """Gives sequences the tokens of their rows, as far as the drafts before them were right."""
        found = FetchedTokens.of(sampled)
        for row, sequence in sequences.items():
            accepted = self.speculation.accept(sequence, drafts.get(row, ()), found.tokens[row])
            for i in range(1 + accepted):
                if sequence.ended:
                    break
                self.delivery.deliver(sequence, *found.at(row, i))
                self._warn_of_memory(sequence)
        self.scheduler.release_ended()
        if self._sampler and self._sampler[0] != self.scheduler.batch_version:
            self._sampler = None  # Its masks are of no more use, and large.

    def _warn_of_memory(self, sequence: SequenceState) -> None:
        """Says once that answers end where memory does."""
        if sequence.finish_reason != "length" or self._warned_of_memory:
            return
        allowed = self.limits.allowed_tokens(sequence.request)
        if len(sequence.tokens) < allowed:
            self._warned_of_memory = True
            logger.warning(
                "an answer ended after %d of the %d tokens that the model's defaults allow it: "
                "there is no memory for a KV cache of more than %d, the prompt's included; use "
                "more devices",
                len(sequence.tokens),
                allowed,
                sequence.length,
            )
