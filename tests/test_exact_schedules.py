# SPDX-License-Identifier: Apache-2.0
"""Exact numerics under any schedule: cold, cached, chunked, preempted, beside others: same bits."""

import random
from collections import Counter

import numpy as np
import pytest

from mesh_model import MeshModel
from meshwen.cache.budget import KVCachePlan
from meshwen.engine.engine import Engine
from meshwen.engine.request import Completion, Request
from meshwen.engine.runner import ModelRunner
from meshwen.engine.sampling_params import SamplingParams
from tiny_model import ONE_LAYER, TINY

LONGEST = 140  # tokens of a prompt and its answer
SAMPLED = {"temperature": 1.0, "logprobs": True}


def engine(of: ModelRunner, blocks: int, rows: int = 4, budget: int = 32) -> Engine:
    """One with so many KV blocks on each part of the batch."""
    parts = of.plan.data_devices
    plan = KVCachePlan(1 + blocks, of.model.backend.block_size, 1, parts, rows, LONGEST)
    return Engine(of, None, (), plan, max_num_batched_tokens=budget)


def requests(draw: random.Random, count: int) -> list[Request]:
    """Prompts of which some begin as others do, or as others with their answers might."""
    made: list[list[int]] = []
    found = []
    for number in range(count):
        own = [draw.randrange(ONE_LAYER.vocab_size) for _ in range(draw.choice((1, 3, 20, 30)))]
        begin = draw.choice(made)[: draw.choice((32, 64))] if made and number % 3 else []
        prompt = (begin + own)[: LONGEST - 8]
        made.append(prompt)
        limit = min(draw.choice((1, 6, 40, 70)), LONGEST - len(prompt))
        answers = draw.choice((1, 1, 1, 2))
        sampling = SamplingParams(max_new_tokens=limit, seed=number, n=answers, **SAMPLED)
        found.append(Request(tuple(prompt), sampling))
    return found


def bits(one: Completion) -> tuple[tuple[int, ...], bytes, str]:
    assert one.logprobs is not None
    return one.tokens, np.array(one.logprobs, np.float32).tobytes(), one.finish_reason


def alone(of: ModelRunner, request: Request) -> dict[int, tuple]:
    """By choice what a request has on an engine that nothing else has been on."""
    found = {}
    for choice in range(request.sampling.n):
        events = engine(of, blocks=10).run([request.answer(choice)])
        [found[choice]] = [bits(e.completion) for e in events if e.completion]
    return found


def finished(of: Engine, asked: list[Request], draw: random.Random) -> dict[tuple[int, int], tuple]:
    """By request and choice what they have that come at random times, some of them cancelled."""
    done, numbers, waiting = {}, {}, list(enumerate(asked))

    def note(index):
        def on_event(event):
            if event.completion:
                done[index, event.choice] = bits(event.completion)

        return on_event

    core = of._core
    while waiting or of.busy:
        while waiting and draw.random() < 0.4:
            index, request = waiting.pop(0)
            numbers[index] = of.submit(request, note(index))
        if numbers and draw.random() < 0.02:
            of.cancel(numbers[draw.choice(list(numbers))])
        of.step()
        core.blocks.check()
    assert core.blocks.used_blocks == 0
    return done


@pytest.mark.parametrize(
    ("config", "mesh", "dtype", "quantization", "kernels"),
    [
        pytest.param(ONE_LAYER, "1", "float32", None, True, id="float32"),
        pytest.param(TINY, "1", "bfloat16", None, True, id="bfloat16", marks=pytest.mark.slow),
        pytest.param(ONE_LAYER, "1x8", "bfloat16", None, True, id="1x8"),
        pytest.param(ONE_LAYER, "2x4", "float32", "int8", True, id="int8 on 2x4"),
        pytest.param(ONE_LAYER, "data=2,model=4", "float32", None, True, id="data=2,model=4"),
        pytest.param(ONE_LAYER, "data=2", "bfloat16", None, False, id="XLA"),
    ],
)
def test_a_request_has_the_bits_that_it_has_alone_on_a_cold_engine(
    config, mesh, dtype, quantization, kernels, optimised
):
    model = MeshModel(config, mesh, dtype, None, "exact", quantization, kernels=kernels)
    of, draw = model.runner, random.Random(1)
    asked = requests(draw, 24)
    parts = of.plan.data_devices
    # Of four sequences a part may have two: blocks for one and a half of the longest.
    steps = engine(of, blocks=5, rows=4 * parts)
    found = finished(steps, asked, draw)
    expected = {(i, c): one for i, r in enumerate(asked) for c, one in alone(of, r).items()}
    assert len(found) > 0.7 * len(expected)
    assert {place: expected[place] for place in found} == found
    stats, scheduler = steps._core.blocks.stats, steps._core.scheduler
    assert stats.cached_tokens
    assert stats.evictions
    assert scheduler.preemptions
    assert Counter(reason for *_, reason in found.values())["length"] == len(found)
