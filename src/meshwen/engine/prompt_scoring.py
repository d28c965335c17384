# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of prompts, found as their chunks are prefilled."""

from __future__ import annotations

import numpy as np
from jax import Array

from meshwen.engine.runner import ModelRunner
from meshwen.engine.sampling import top_bucket
from meshwen.engine.step_plan import StepPlan
from meshwen.parallel.distributed import to_host


def score_prompts(runner: ModelRunner, plan: StepPlan, hidden: Array) -> None:
    """Gives the sequences of a step the log-probabilities of their prompts' next tokens.

    Args:
        runner: the model.
        plan: the step; some of its chunks are `scored`.
        hidden: float32 [P*N, D], the final hidden states of all its tokens.
    """
    targets = np.zeros(len(hidden), np.int32)
    found, most = [], 0
    for chunk, place in plan.places():
        prompt = chunk.sequence.prompt_logprobs
        if prompt is not None and chunk.scored:
            targets[place] = prompt.targets(chunk.start, chunk.count)
            most = max(most, chunk.sequence.request.sampling.top_logprobs)
            found.append((prompt, chunk.start, place))
    logprobs = runner.logprobs(hidden, targets, top_bucket(most, runner.config.vocab_size))
    chosen = to_host(logprobs.chosen)
    top_ids, top = (None if a is None else to_host(a) for a in logprobs[1:])
    for prompt, start, place in found:
        if top_ids is None or top is None:
            prompt.push(start, chosen[place])
        else:
            prompt.push(start, chosen[place], top_ids[place], top[place])
