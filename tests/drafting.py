# SPDX-License-Identifier: Apache-2.0
"""Answers with draft tokens, in exact numerics: what the tests of speculation share."""

import numpy as np

from mesh_model import shared_model
from meshwen.engine.drafter import Drafter
from meshwen.engine.engine import Engine
from meshwen.engine.options import EngineOptions
from meshwen.engine.prompt_lookup import PromptLookup
from meshwen.engine.request import Request
from meshwen.engine.runner import ModelRunner
from meshwen.engine.sampling_params import SamplingParams
from meshwen.engine.speculation import Speculation
from tiny_model import ONE_LAYER

GREEDY = SamplingParams(max_new_tokens=40, temperature=0, logprobs=True, top_logprobs=3)
CONTEXT = 70


class CountingRunner:
    """A runner that notes the most tokens that a sequence has in each decode step."""

    def __init__(self, runner: ModelRunner):
        self._runner, self.steps = runner, []

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def step(self, cache, inputs, *rest):
        starts = inputs.query_starts.reshape(self._runner.plan.data_devices, -1)
        longest = int(np.diff(starts).max())
        if longest == 1 or inputs.sampler_rows is not None:  # Of others there are prompts.
            self.steps.append(longest)
        return self._runner.step(cache, inputs, *rest)


def run(
    prompts,
    sampling,
    drafts,
    mesh="1",
    rows=2,
    dtype=np.float32,
    config=ONE_LAYER,
    eos=(),
    drafter: Drafter | None = None,
):
    """Completions by request in exact numerics, and the tokens of each step.

    `sampling` is that of all prompts, or a list of each one's.
    """
    runner = CountingRunner(shared_model(config, mesh, dtype, "exact").runner)
    plan = EngineOptions(max_num_seqs=rows, max_model_len=CONTEXT).cache_plan(runner.model)
    speculation = Speculation(PromptLookup() if drafter is None else drafter, drafts)
    engine = Engine(runner, None, eos, plan, speculation=speculation)
    each = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
    requests = [Request(tuple(p), one) for p, one in zip(prompts, each, strict=True)]
    done = {e.request: e.completion for e in engine.run(requests) if e.completion}
    return [done[i] for i in range(len(prompts))], runner.steps


def repeating(length: int, seed: int) -> list[int]:
    part = np.random.default_rng(seed).integers(0, ONE_LAYER.vocab_size, 7).tolist()
    return (part * 20)[:length]


# Of one bucket: all tests share two rows of one cache, and what is compiled for it.
PROMPTS = [repeating(25, 0), [*range(26)], repeating(32, 1), repeating(28, 2), [3] * 30]
