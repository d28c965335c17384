# SPDX-License-Identifier: Apache-2.0
"""Prompts on their way into the KV cache, chunk by chunk; answers too, when read again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
from jax import Array

from meshwen.cache.kv_cache import KVCache
from meshwen.engine.batch_sampler import BatchSampler
from meshwen.engine.runner import ModelRunner
from meshwen.engine.sampling import Sampled
from meshwen.engine.sequence import SequenceState
from meshwen.parallel.plan import ParallelPlan
from meshwen.runtime.shape_buckets import bucket


@dataclass
class Prefill:
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
    ) -> Prefill:
        """Of each part, the row and the sequence that it takes."""
        token_ids = np.zeros((parts, sum(chunks)), np.int32)
        rows, lengths = (np.zeros(parts, np.int32) for _ in range(2))
        sequences = {part: sequence for part, (_, sequence) in taken.items()}
        for part, (row, sequence) in taken.items():
            known = sequence.token_ids
            token_ids[part, : len(known)] = known
            rows[part], lengths[part] = row, len(known)
        return cls(sequences, token_ids, rows, lengths, list(chunks), runner.empty_hidden(parts))

    def without(self, numbers: Collection[int]) -> Prefill | None:
        """What is left when requests are dropped; None where nothing is."""
        left = {part: s for part, s in self.sequences.items() if s.number not in numbers}
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
        """The next token of each answer."""
        sampler = BatchSampler.of(self.sequences, len(self.lengths), plan)
        rows = sampler.now(self.sequences)
        return runner.first(self.hidden, self.lengths, rows, sampler.seen, sampler.method)
