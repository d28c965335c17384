# SPDX-License-Identifier: Apache-2.0
"""What the sampler is told of the sequences of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import jax
import numpy as np
from jax import Array

from meshwen.jax_settings import own_settings
from meshwen.parallel.plan import ParallelPlan
from meshwen.sampling import SamplerRows, SamplingMethod, SamplingParams
from meshwen.sequence import SequenceState


@dataclass(frozen=True)
class BatchSampler:
    """What the sampler is told of the sequences in some rows."""

    method: SamplingMethod
    rows: SamplerRows
    seen: Array | None  # bool [B, V padded], tokens of prompts and answers

    @classmethod
    @own_settings()
    def of(cls, running: Mapping[int, SequenceState], size: int, plan: ParallelPlan) -> Self:
        """Of sequences by row, among `size` rows."""
        asked = {row: sequence.request.sampling for row, sequence in running.items()}
        method = SamplingMethod.of(list(asked.values()), plan.config.vocab_size)
        rows = SamplerRows.of([asked.get(row, SamplingParams()) for row in range(size)])
        if not method.penalize:
            return cls(method, rows, None)
        seen = np.zeros((size, len(plan.axis_source("vocab"))), bool)
        for row, sequence in running.items():
            seen[row, sequence.token_ids] = True
        # Placed as a step returns it: the first step's program then serves all others.
        return cls(method, rows, jax.device_put(seen, plan.sharding("batch", "vocab")))
