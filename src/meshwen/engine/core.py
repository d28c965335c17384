# SPDX-License-Identifier: Apache-2.0
"""The step loop: the scheduler's decisions, computed on the model and delivered."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

import jax
from jax import Array

from meshwen.cache.block_manager import BlockManager
from meshwen.cache.budget import KVCachePlan
from meshwen.cache.kv_cache import KVCache
from meshwen.engine.batch_sampler import BatchSampler
from meshwen.engine.delivery import Delivery
from meshwen.engine.fetched_tokens import FetchedTokens
from meshwen.engine.limits import SequenceLimits
from meshwen.engine.prompt_scoring import score_prompts
from meshwen.engine.runner import ModelRunner
from meshwen.engine.sampling import Sampled
from meshwen.engine.scheduler import Scheduler
from meshwen.engine.sequence import SequenceState
from meshwen.engine.speculation import Speculation
from meshwen.engine.step_inputs import StepInputs, copied
from meshwen.engine.step_plan import InputArrays, StepPlan

logger = logging.getLogger(__name__)


class EngineCore:
    """Steps a model's sequences, for one thread at a time: `meshwen.engine.engine` is for several.

    Args:
        runner: the model.
        plan: how many KV blocks there are.
        max_num_batched_tokens: the most tokens of a step.
        prefix_caching: whether sequences share the blocks of equal prefixes.
        speculation: when steps have draft tokens.

    Attributes:
        limits: how long sequences may become.
        blocks: which KV blocks sequences have.
        scheduler: decides what each step computes.
        delivery: gives tokens to those who asked.
    """

    def __init__(
        self,
        runner: ModelRunner,
        plan: KVCachePlan,
        max_num_batched_tokens: int,
        prefix_caching: bool,
        speculation: Speculation,
    ):
        self.runner, self.speculation = runner, speculation
        self.limits, self._plan = SequenceLimits(plan), plan
        self.blocks = BlockManager(plan.parts, plan.num_blocks, plan.block_size, prefix_caching)
        self.scheduler = Scheduler(
            self.blocks, plan.parts, plan.max_num_seqs, max_num_batched_tokens
        )
        self.delivery = Delivery()
        backend, most = runner.model.backend, -(-plan.longest // plan.block_size)
        self._arrays = InputArrays(
            self.blocks.table, lambda needed: backend.table_width(needed, most)
        )
        self._cache: KVCache = ()  # Made when there is something to run.
        self._sampler: tuple[tuple[int, int], BatchSampler] | None = None
        self._warned_of_memory = False

    def clear(self) -> None:
        """Drops all sequences and the cache, as after a step that broke off."""
        self._cache = ()
        self.scheduler.clear()
        self.delivery.clear()
        self.speculation.clear()
        self._sampler = None

    def step(self, new: Iterable[SequenceState] = (), *, drop_cancelled: bool = False) -> None:
        """Computes a token of each answer, and chunks of prompts as far as the budget goes.

        Args:
            new: sequences that are to wait first.
            drop_cancelled: some sequences were cancelled since the last step.

        Raises:
            BaseException: the step broke off and has taken the cache with it: call `clear`.
        """
        self.scheduler.add(new)
        if drop_cancelled:
            self.scheduler.drop_cancelled()
        plan = self.scheduler.schedule()
        if any(plan.chunks):
            self._compute(plan)
        self.speculation.forget_ended()

    @property
    def cache(self) -> KVCache:
        """The KV blocks, made when they are first asked for. Set it to what a program gives back.

        A program that takes them as donated must not fail without a call of `clear`.
        """
        if not self._cache:
            self._cache = self.runner.empty_blocks(self._plan.num_blocks)
        return self._cache

    @cache.setter
    def cache(self, cache: KVCache) -> None:
        self._cache = cache

    def _compute(self, plan: StepPlan) -> None:
        if not plan.samples:
            self._forward(plan, self._inputs(plan))
            # Whoever waits for the end of a step, as Ctrl-C does, waits for one, not for all.
            jax.block_until_ready(self.cache)
            return
        sampler = self._batch_sampler(plan)
        if not plan.prefills:
            self._draft(plan, sampler)
        inputs = self._inputs(plan)
        sampled_for = ((one.sequence, one.drafts, places) for _, one, places in plan.sampled())
        rows = sampler.rows_of_step(sampled_for, len(inputs.asked))
        how = rows, sampler.penalized, sampler.method
        if plan.prefills:  # By two programs: sizes of chunks and sampling methods do not multiply.
            hidden, inputs = self._forward(plan, inputs)
            sampled, penalized = self.runner.sample(hidden, inputs, *how)
        else:
            sampled, penalized, self.cache = self.runner.step(self.cache, inputs, *how)
        if any(plan.copies):
            self.cache = self.runner.copied_blocks(self.cache, *copied(plan.copies))
        self._sampler = self._key(plan), replace(sampler, penalized=penalized)
        self._deliver(plan, sampled)

    def _forward(self, plan: StepPlan, inputs: StepInputs) -> tuple[Array, StepInputs]:
        """Hidden states of a step's tokens, and which of them something is sampled after."""
        if not any(chunk.scored for chunk in plan):
            hidden, self.cache = self.runner.forward(self.cache, inputs)
            return hidden, inputs.of_asked()
        hidden, self.cache = self.runner.forward(self.cache, inputs.of_all())
        score_prompts(self.runner, plan, hidden)
        return hidden, inputs

    def _inputs(self, plan: StepPlan) -> StepInputs:
        return self._arrays.inputs(plan, self.scheduler.batch_version)

    def _key(self, plan: StepPlan) -> tuple[int, int]:
        """What a batch sampler is made for."""
        return self.scheduler.batch_version, plan.row_bucket

    def _batch_sampler(self, plan: StepPlan) -> BatchSampler:
        """That of the last step, unless what is in which row has changed since."""
        if self._sampler and self._sampler[0] == self._key(plan):
            return self._sampler[1]
        self._sampler = None  # Its masks are of no more use, and large.
        R = plan.row_bucket
        sequences = {part * R + row: one for part, row, one in self.scheduler.rows()}
        return BatchSampler.of(sequences, R * self._plan.parts, self.runner.plan)

    def _draft(self, plan: StepPlan, sampler: BatchSampler) -> None:
        """Adds draft tokens to a step, as far as there are blocks for them."""
        chunks = plan.by_row()
        sequences = {row: chunk.sequence for row, chunk in chunks.items()}
        for row, tokens in self.speculation.drafts(sequences, plan.row_bucket, sampler).items():
            one = sequences[row]
            tokens = tokens[: self._plan.longest - one.length]
            # Drafts may be wrong: the next token of each other sequence needs a block before.
            others = len(plan.chunks[self.blocks.part(one.number)]) - 1
            if self.blocks.extend(one.number, one.length + len(tokens), reserve=others):
                chunks[row].drafts = tokens
            else:
                self.speculation.refuse(one)

    def _deliver(self, plan: StepPlan, sampled: Sampled) -> None:
        """Gives sequences the tokens of their rows, as far as the drafts before them were right."""
        found = FetchedTokens.of(sampled)
        for _, chunk, places in plan.sampled():
            sequence = chunk.sequence
            accepted = self.speculation.accept(
                sequence, chunk.drafts, found.tokens[places].tolist()
            )
            for place in places[: 1 + accepted]:
                if sequence.ended:
                    break
                self.delivery.deliver(sequence, *found.at(place))
                self._warn_of_memory(sequence)
            sequence.computed = sequence.length - 1
        self.scheduler.release_ended()
        if self._sampler and self._sampler[0][0] != self.scheduler.batch_version:
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
