# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of prompts, in whatever steps they are prefilled: against float64."""

import functools

import numpy as np
import pytest

import reference
from mesh_model import random_tokens, shared_model
from meshwen.engine.engine import Engine
from meshwen.engine.options import EngineOptions
from meshwen.engine.request import Completion, Request
from meshwen.engine.sampling_params import SamplingParams
from tiny_model import ONE_LAYER

# Of few buckets, and with answers of one token: few programs are compiled.
PROMPTS = [tuple(random_tokens(ONE_LAYER, 1, n, seed=n)[0].tolist()) for n in (30, 27, 1)]
TOP = 3


def engine(mesh: str = "1", tokens: int = 512) -> Engine:
    """In exact numerics; steps of so many tokens."""
    runner = shared_model(ONE_LAYER, mesh, np.float32, "exact").runner
    plan = EngineOptions(max_num_seqs=4).cache_plan(runner.model)
    return Engine(runner, None, (), plan, max_num_batched_tokens=tokens)


def request(prompt, **sampling) -> Request:
    asked = {"max_new_tokens": 1, "prompt_logprobs": True, "top_logprobs": TOP}
    return Request(tuple(prompt), SamplingParams(**asked | sampling))


def scores(completion: Completion) -> tuple:
    """The same numbers only if the same bits."""
    return completion.prompt_logprobs, completion.prompt_top_logprobs


def answers(running: Engine, *requests: Request) -> list[Completion]:
    done = {(e.request, e.choice): e.completion for e in running.run(requests) if e.completion}
    return [done[key] for key in sorted(done)]


@functools.cache
def alone() -> list[tuple]:
    """Of each prompt by itself, on a new engine."""
    return [scores(answers(engine(), request(prompt))[0]) for prompt in PROMPTS]


def test_log_probabilities_of_a_prompt_are_those_of_float64():
    for prompt, (logprobs, tops) in zip(PROMPTS, alone(), strict=True):
        weights = reference.random_weights(ONE_LAYER)
        exact = reference.logits(weights, ONE_LAYER, prompt)[:-1]
        exact = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
        assert logprobs[0] is tops[0] is None
        assert len(logprobs) == len(tops) == len(prompt)
        expected = exact[np.arange(len(exact)), prompt[1:]]
        np.testing.assert_allclose(logprobs[1:], expected, rtol=0, atol=1e-4)
        for top, row in zip(tops[1:], exact, strict=True):
            order = np.argsort(-row)[:TOP]
            assert [token for token, _ in top] == order.tolist()
            np.testing.assert_allclose([x for _, x in top], row[order], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("mesh", "tokens"), [("1", 16), ("data=2,model=4", 512)])
def test_their_bits_depend_on_no_mesh_chunk_batch_or_cache(mesh, tokens):
    running = engine(mesh, tokens)
    others = [request(prompt, prompt_logprobs=False, top_logprobs=0) for prompt in PROMPTS[:2]]
    for _ in range(2):  # The second time the prompts are in the cache.
        found = answers(running, *others, *map(request, PROMPTS))
        assert [one.prompt_logprobs for one in found[:2]] == [None] * 2
        assert [scores(one) for one in found[2:]] == alone()


def test_the_answers_of_one_prompt_have_them_all():
    found = answers(engine(), request(PROMPTS[1], n=3, temperature=1.0), request(PROMPTS[2], n=2))
    assert [scores(one) for one in found] == [alone()[1]] * 3 + [alone()[2]] * 2


def test_an_answer_has_as_a_prompt_the_bits_that_it_was_drawn_with():
    (drawn,) = answers(engine(), request(PROMPTS[1], logprobs=True, max_new_tokens=3))
    read, plain = answers(
        engine(), request((*PROMPTS[1], *drawn.tokens)), request(PROMPTS[0], top_logprobs=0)
    )
    assert read.prompt_logprobs[len(PROMPTS[1]) :] == drawn.logprobs
    assert read.prompt_top_logprobs[len(PROMPTS[1]) :] == drawn.top_logprobs
    assert (plain.prompt_logprobs, plain.prompt_top_logprobs) == (alone()[0][0], None)
