# SPDX-License-Identifier: Apache-2.0
"""Programs that the engine compiles: few, and none once it has seen what there is to do."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import pytest

from mesh_model import MeshModel
from meshwen.cache.budget import KVCachePlan
from meshwen.engine.engine import Engine
from meshwen.engine.request import Request
from meshwen.engine.sampling_params import SamplingParams
from tiny_model import ONE_LAYER

pytestmark = pytest.mark.usefixtures("unoptimised")


@contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """What is compiled meanwhile, or read from the cache of compiled programs."""
    found: list[str] = []

    def listener(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def run(of: Engine, seed: int) -> None:
    """The same lengths and arrivals each time, of other tokens."""
    lengths, tokens = random.Random(0), random.Random(seed)
    for _ in range(60):
        if lengths.random() < 0.3:
            count = lengths.choice((1, 7, 40, 90))
            prompt = tuple(tokens.randrange(ONE_LAYER.vocab_size) for _ in range(count))
            sampling = SamplingParams(max_new_tokens=lengths.choice((1, 9, 30)))
            of.submit(Request(prompt, sampling), lambda event: None)
        of.step()
    while of.busy:
        of.step()


def test_what_has_been_computed_before_compiles_nothing_and_all_of_it_little():
    runner = MeshModel(ONE_LAYER).runner
    plan = KVCachePlan(40, 32, 1, 1, max_num_seqs=8, max_model_len=130)
    engine = Engine(runner, None, (), plan, max_num_batched_tokens=64)
    with counted_compilations() as first:
        run(engine, seed=1)
    with counted_compilations() as second:
        run(engine, seed=2)
    assert not second
    assert first
    # 8 sequences in steps with prompts, of 8 to 64 tokens (6 sizes), and what follows them; 1, 2, 4
    # or 8 without; and the cache.
    assert 5 < len(runner._programs) <= 6 + 1 + 4 + 1
