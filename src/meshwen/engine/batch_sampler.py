# SPDX-License-Identifier: Apache-2.0
"""The sampling parameters of a batch, as the arrays that the sampler takes."""

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
    """What the sampler has to know of the sequences in some rows; the same for all their steps.

    Attributes:
        method: what the batch needs of the sampler.
        rows: the sequences' parameters, without what depends on the step.
        penalized: bool [B, V padded], tokens that repetition penalties apply to: those of prompts
            and answers, but for the newest token of each; None without such penalties.
        constrained: whether some sequence may not go on with every token.
        plan: the model on its mesh.
    """

    method: SamplingMethod
    rows: SamplerRows
    penalized: Array | None
    constrained: bool
    plan: ParallelPlan

    @classmethod
    @own_settings()
    def of(cls, sequences: Mapping[int, SequenceState], size: int, plan: ParallelPlan) -> Self:
        """The sampler of sequences by row, among `size` rows."""
        asked = {row: sequence.request.sampling for row, sequence in sequences.items()}
        method = SamplingMethod.of(list(asked.values()), plan.sizes.vocab)
        rows = SamplerRows.of([asked.get(row, SamplingParams()) for row in range(size)])
        prompts = {row: sequence.request.prompt_tokens for row, sequence in sequences.items()}
        if any(one.encoder_repetition_penalty != 1 for one in asked.values()):
            rows = rows._replace(prompt=_token_mask(prompts, size, plan))
        penalized = None
        if method.penalize:
            tokens = {row: sequence.token_ids for row, sequence in sequences.items()}
            penalized = _token_mask(tokens, size, plan)
        constrained = any(sequence.constraints for sequence in sequences.values())
        return cls(method, rows, penalized, constrained, plan)

    def rows_of_step(self, sequences: Mapping[int, SequenceState]) -> SamplerRows:
        """The parameters for the next step of the same sequences, with their constraints."""
        if not self.constrained:
            return self.rows
        forbidden = np.zeros((len(self.rows.seed), self.plan.axis_length("vocab")), bool)
        for row, sequence in sequences.items():
            if sequence.constraints is not None:
                sequence.constraints.forbid(forbidden[row])
        return self.rows._replace(forbidden=forbidden)


def _token_mask(tokens: Mapping[int, Sequence[int]], size: int, plan: ParallelPlan) -> Array:
    """Which tokens each row has: bool [size, V padded]."""
    mask = np.zeros((size, plan.axis_length("vocab")), bool)
    for row, some in tokens.items():
        mask[row, list(some)] = True
    # Placed as a step returns it: the first step's program then serves all others.
    return jax.device_put(mask, plan.sharding("batch", "vocab"))
