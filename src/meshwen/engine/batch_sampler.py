# SPDX-License-Identifier: Apache-2.0
"""What the sampler is told of the sequences of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import jax
import numpy as np
from jax import Array

from meshwen.engine.sampling import SamplerRows, SamplingMethod
from meshwen.engine.sampling_params import SamplingParams
from meshwen.engine.sequence import SequenceState
from meshwen.parallel.plan import ParallelPlan
from meshwen.runtime.jax_settings import own_settings


@dataclass(frozen=True)
class BatchSampler:
    """What the sampler is told of the sequences in some rows."""

    method: SamplingMethod
    rows: SamplerRows
    seen: Array | None  # bool [B, V padded], tokens of prompts and answers
    constrained: bool  # Some sequence may not go on with every token.
    plan: ParallelPlan

    @classmethod
    @own_settings()
    def of(cls, running: Mapping[int, SequenceState], size: int, plan: ParallelPlan) -> Self:
        """Of sequences by row, among `size` rows."""
        asked = {row: sequence.request.sampling for row, sequence in running.items()}
        method = SamplingMethod.of(list(asked.values()), plan.config.vocab_size)
        rows = SamplerRows.of([asked.get(row, SamplingParams()) for row in range(size)])
        prompts = {row: sequence.request.prompt_tokens for row, sequence in running.items()}
        if any(one.encoder_repetition_penalty != 1 for one in asked.values()):
            rows = rows._replace(prompt=_mask(prompts, size, plan))
        seen = None
        if method.penalize:
            tokens = {row: sequence.token_ids for row, sequence in running.items()}
            seen = _mask(tokens, size, plan)
        constrained = any(sequence.constraints for sequence in running.values())
        return cls(method, rows, seen, constrained, plan)

    def now(self, running: Mapping[int, SequenceState]) -> SamplerRows:
        """The rows of the next step, which the same sequences take."""
        if not self.constrained:
            return self.rows
        forbidden = np.zeros((len(self.rows.seed), self.plan.axis_length("vocab")), bool)
        for row, sequence in running.items():
            if sequence.constraints is not None:
                sequence.constraints.forbid(forbidden[row])
        return self.rows._replace(forbidden=forbidden)


def _mask(tokens: Mapping[int, Sequence[int]], size: int, plan: ParallelPlan) -> Array:
    """Which tokens each row has: bool [size, V padded]."""
    mask = np.zeros((size, plan.axis_length("vocab")), bool)
    for row, some in tokens.items():
        mask[row, list(some)] = True
    # Placed as a step returns it: the first step's program then serves all others.
    return jax.device_put(mask, plan.sharding("batch", "vocab"))
