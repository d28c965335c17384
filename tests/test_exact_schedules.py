# SPDX-License-Identifier: Apache-2.0
"""Exact numerics under any schedule: cold, cached, chunked, preempted, beside others: same bits."""

import functools
import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pytest

from mesh_model import MeshModel
from meshwen import Qwen2ForCausalLM
from meshwen.cache.budget import KVCachePlan
from meshwen.engine.engine import Engine
from meshwen.engine.request import Completion, Request
from meshwen.engine.runner import ModelRunner
from meshwen.engine.sampling_params import SamplingParams
from meshwen.ops.backend import XLA
from meshwen.runtime.shape_buckets import shape_bucket
from needs_kernels import needs_kernels
from tiny_model import FULL_LAST

pytestmark = pytest.mark.usefixtures("unoptimised")
BLOCK = 32


@dataclass(frozen=True)
class Case:
    """What runs how.

    Attributes:
        config: None: the demo model.
        longest: tokens of a prompt and its answer.
        text: tokens of each text that prompts begin with, one or two of them: whole blocks.
        scored: some requests want log-probabilities of their prompts.
        penalty: of tokens that an answer has.
    """

    mesh: str
    dtype: str = "float32"
    quantization: str | None = None
    kernels: bool = True
    config: object = FULL_LAST
    longest: int = 140
    text: int = BLOCK
    count: int = 16
    scored: bool = False
    penalty: float = 0.0

    def runner(self, mesh: str) -> ModelRunner:
        """The model on a mesh."""
        return _runner(mesh, self.dtype, self.quantization, self.kernels, self.config)


@functools.cache
def _runner(mesh, dtype, quantization, kernels, config) -> ModelRunner:
    if config is None:
        how = {"mesh": mesh, "dtype": dtype, "numerics": "exact"}
        return Qwen2ForCausalLM.from_pretrained("demo", **how).runner
    return MeshModel(config, mesh, dtype, None, "exact", quantization, kernels=kernels).runner


def engine(of: ModelRunner, longest: int, blocks: int, rows: int, budget: int) -> Engine:
    """One with so many KV blocks, and rows, on each part of the batch."""
    parts = of.plan.data_devices
    plan = KVCachePlan(1 + blocks, BLOCK, 1, parts, rows * parts, longest)
    return Engine(of, None, (), plan, max_num_batched_tokens=budget)


class Alone:
    """What requests have on an engine of one device that is new and computes each prompt at once.

    All prompts by one program; no schedule has its number of tokens, nor its width of tables.
    """

    def __init__(self, case: Case):
        self.runner, self._longest = case.runner("1"), case.longest + 2 * BLOCK

    def completion(self, request: Request) -> Completion:
        """Of one answer."""
        size, blocks = shape_bucket(self._longest), -(-self._longest // BLOCK)
        new = engine(self.runner, self._longest, blocks, rows=1, budget=size)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("meshwen.engine.step_plan.step_bucket", lambda tokens: size)
            [found] = [e.completion for e in new.run([request]) if e.completion]
        return found


def bits(one: Completion) -> tuple:
    prompt = None if one.prompt_logprobs is None else np.float32(one.prompt_logprobs[1:]).tobytes()
    return one.tokens, np.float32(one.logprobs).tobytes(), prompt, one.finish_reason


# Texts at the beginning of the first prompts: the last two have each where another prompt had it,
# but behind another text.
_ORDERS = ((0, 1), (1, 0), (0, 0), (1, 1))


def drawn(case: Case, draw: random.Random, alone: Alone) -> Iterable[tuple[Request, list[tuple]]]:
    """Requests, and the bits of their answers alone.

    Their prompts begin with the same texts in many orders, or with others and their answers, which
    they find only if they have the same salt.
    """
    vocabulary = alone.runner.config.vocab_size

    def tokens(count: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(count)]

    texts, talks = [tokens(case.text) for _ in range(3)], []
    for number in range(case.count):
        if number < len(_ORDERS):
            begin = [id for text in _ORDERS[number] for id in texts[text]]
        elif number % 4 == 3:
            begin = draw.choice(talks)
        else:
            begin = [id for _ in range(draw.choice((0, 1, 2, 2))) for id in draw.choice(texts)]
        ordered = number < len(_ORDERS)
        own = tokens(3 if ordered else draw.choice((1, 3, 20, 30)))
        prompt = [*begin, *own][: case.longest - 8]
        limit = min(6 if ordered else draw.choice((1, 6, 20, 45)), case.longest - len(prompt))
        sampling = SamplingParams(
            max_new_tokens=limit,
            temperature=1.0,
            seed=number,
            n=1 if ordered else draw.choice((1, 1, 2)),
            presence_penalty=case.penalty * draw.choice((1, -1)),
            logprobs=True,
            prompt_logprobs=case.scored and number % 4 == 2 and not ordered,
        )
        salt = "" if ordered else draw.choice(("", "", "", "other"))
        request = Request(tuple(prompt), sampling, salt)
        found = [alone.completion(request.answer(choice)) for choice in range(sampling.n)]
        talks += [[*prompt, *one.tokens] for one in found]
        yield request, [bits(one) for one in found]


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


@pytest.fixture
def one_width_of_tables(monkeypatch):
    """Without kernels every width of block tables is a program: here one."""
    monkeypatch.setattr("meshwen.ops.backend.Backend.table_width", lambda backend, _, most: most)


CASES = {
    "float32": Case("1", scored=True, penalty=0.7),
    "data=2,model=4": Case("data=2,model=4", penalty=0.7),
    "bfloat16 on 1x8": Case("1x8", "bfloat16"),
    "int8 on 2x4": Case("2x4", quantization="int8"),
    "XLA": Case("data=2,model=2", kernels=False),
    # Attention takes 512 positions at a time.
    "demo": Case("1", "bfloat16", config=None, longest=600, text=256, count=10),
}
WITH_KERNELS = ("bfloat16 on 1x8", "int8 on 2x4", "demo")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=needs_kernels if name in WITH_KERNELS else ())
        for name, case in CASES.items()
    ],
)
def test_a_request_has_the_bits_that_it_has_alone_on_a_cold_engine(
    case, one_width_of_tables, request
):
    of, draw = case.runner(case.mesh), random.Random(5)
    if of.model.matmuls_by == XLA:
        request.getfixturevalue("optimised")
    asked, expected = zip(*drawn(case, draw, Alone(case)), strict=True)
    # Blocks for the longest alone, and a part of a block in a step.
    budget = 16 * of.plan.data_devices
    steps = engine(of, case.longest, -(-case.longest // BLOCK), rows=4, budget=budget)
    found = finished(steps, list(asked), draw)
    assert len(found) > 0.7 * sum(map(len, expected))
    assert {(i, choice): expected[i][choice] for i, choice in found} == found
    stats = steps._core.blocks.stats
    assert min(stats.cached_tokens, stats.evictions, steps._core.scheduler.preemptions) > 0
    assert {reason for *_, reason in found.values()} == {"length"}
