# SPDX-License-Identifier: Apache-2.0
"""The sampling parameters of a batch, as the arrays that the sampler takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import jax
import numpy as np
from jax import Array
from numpy.typing import DTypeLike

from meshwen.engine.penalties import Penalized
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
        penalized: the tokens that penalties apply to, the newest of each included; None without
            penalties.
        constrained: whether some sequence may not go on with every token.
        plan: the model on its mesh.
    """

    method: SamplingMethod
    rows: SamplerRows
    penalized: Penalized | None
    constrained: bool
    plan: ParallelPlan

    @classmethod
    @own_settings()
    def of(cls, sequences: Mapping[int, SequenceState], size: int, plan: ParallelPlan) -> Self:
        """The sampler of sequences by row, among `size` rows."""
        asked = {row: sequence.request.sampling for row, sequence in sequences.items()}
        method = SamplingMethod.of(list(asked.values()), plan.sizes.vocab)
        rows = SamplerRows.of([asked.get(row, SamplingParams()) for row in range(size)])
        if any(one.encoder_repetition_penalty != 1 for one in asked.values()):
            prompts = {
                row: dict.fromkeys(sequence.request.prompt_tokens, True)
                for row, sequence in sequences.items()
            }
            rows = rows._replace(prompt=_table(prompts, size, plan, bool))
        if biases := {row: dict(one.logit_bias) for row, one in asked.items() if one.logit_bias}:
            rows = rows._replace(bias=_table(biases, size, plan, np.float32))
        penalized = _penalized(sequences, size, plan) if method.penalize else None
        constrained = any(sequence.constraints for sequence in sequences.values())
        return cls(method, rows, penalized, constrained, plan)

    def rows_of_step(
        self, sampled: Iterable[tuple[SequenceState, Sequence[int], range]], size: int
    ) -> SamplerRows:
        """The parameters for the next step of the same sequences, with their constraints.

        Args:
            sampled: each sequence, its drafts, and the indices of its samples: the first is what
                follows its newest token, the others what follows each draft.
            size: how many samples the step computes.
        """
        if not self.constrained:
            return self.rows
        forbidden = np.zeros((size, self.plan.axis_length("vocab")), bool)
        for sequence, drafts, places in sampled:
            if sequence.constraints is not None:
                sequence.constraints.forbid(forbidden[places.start : places.stop], drafts)
        return self.rows._replace(forbidden=forbidden)


def _penalized(sequences: Mapping[int, SequenceState], size: int, plan: ParallelPlan) -> Penalized:
    """The tokens of sequences so far, as far as a penalty of one of them needs them."""
    tokens = counts = None
    if any(one.request.sampling.repetition_penalty != 1 for one in sequences.values()):
        both = {row: dict.fromkeys(one.token_ids, True) for row, one in sequences.items()}
        tokens = _table(both, size, plan, bool)
    if any(one.request.sampling.counted for one in sequences.values()):
        answers = {row: Counter(one.tokens) for row, one in sequences.items()}
        counts = _table(answers, size, plan, np.int32)
    return Penalized(tokens, counts)


def _table(
    values: Mapping[int, Mapping[int, float]], size: int, plan: ParallelPlan, dtype: DTypeLike
) -> Array:
    """The value of each row for each token, 0 where it has none: [size, V padded]."""
    table = np.zeros((size, plan.axis_length("vocab")), dtype)
    for row, some in values.items():
        table[row, list(some)] = list(some.values())
    # Placed as a step returns it: the first step's program then serves all others.
    return jax.device_put(table, plan.sharding("batch", "vocab"))
