# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a prompt: against float64, and against what tokens are drawn with."""

import functools
import math
import re

import jax
import numpy as np
import pytest

from mesh_model import shared_model
from meshwen.engine.logprobs import Logprobs, prompt_logprobs_step
from meshwen.engine.sampling import SamplerRows, SamplingMethod, sample
from meshwen.engine.sampling_params import SamplingParams
from tiny_model import TINY, weights

TOP = 5


@functools.cache
def program(mesh: str):
    runner = shared_model(TINY, mesh, np.float32, "exact").runner
    step = prompt_logprobs_step
    return runner.compiled(step, ("batch embed", "batch"), "batch", static="top"), runner


@functools.cache
def states(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states of so many tokens, and the tokens that follow; the first ones of the same."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((512, TINY.hidden_size)).astype(np.float32)
    targets = rng.integers(0, TINY.vocab_size, 512).astype(np.int32)
    return hidden[:count], targets[:count]


@functools.cache
def found(mesh: str, count: int) -> Logprobs:
    run, runner = program(mesh)
    return jax.tree.map(np.asarray, run(runner.params, *states(count), top=TOP))


@pytest.mark.parametrize(("mesh", "count"), [("1", 150), ("2x4", 70), ("data=2,model=4", 6)])
def test_log_probabilities_are_those_of_float64_and_their_bits_everywhere_the_same(mesh, count):
    hidden, targets = states(count)
    exact = hidden.astype(np.float64) @ weights()["lm_head.weight"].T.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    chosen, top_ids, top = found(mesh, count)
    np.testing.assert_allclose(chosen, exact[np.arange(count), targets], rtol=0, atol=1e-5)
    order = np.argsort(-exact, axis=1, kind="stable")[:, :TOP]
    np.testing.assert_array_equal(top_ids, order)
    np.testing.assert_allclose(top, np.take_along_axis(exact, order, axis=1), rtol=0, atol=1e-5)
    for one, whole in zip(found(mesh, count), found("1", 150), strict=True):
        assert one.dtype == whole.dtype
        np.testing.assert_array_equal(one, whole[:count])


def test_they_have_the_bits_of_those_that_a_token_is_drawn_with():
    count, (_, runner) = 6, program("data=2,model=4")
    hidden, _ = states(count)
    asked = [SamplingParams(logprobs=True, top_logprobs=TOP)] * count
    method = SamplingMethod.of(asked, TINY.vocab_size)

    def draw(params, hidden, positions, rows, *, model):
        logits = model.logits(params, hidden)
        return sample(logits, rows, positions, None, TINY.vocab_size, method, model.ops)

    rows = SamplerRows.filled("batch", "batch vocab")
    drawing = runner.compiled(draw, ("batch embed", "batch", rows), "batch")
    positions = np.arange(count, dtype=np.int32)
    drawn = drawing(runner.params, hidden, positions, SamplerRows.of(asked))
    run, one = program("1")
    read = run(one.params, hidden, np.asarray(drawn.tokens), top=TOP)
    for mine, theirs in zip(read, drawn[1:], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(drawn.top_logprobs[:, 0], drawn.logprobs)


def test_none_are_likeliest_where_none_were_asked_for():
    run, runner = program("1")
    chosen, *top = run(runner.params, *states(6), top=0)
    np.testing.assert_array_equal(chosen, found("1", 150).chosen[:6])
    assert top == [None, None]


def test_the_logits_of_a_long_prompt_are_never_in_memory_at_once():
    run, runner = program("1")
    text = run.lower(runner.params, *states(512), top=0).compile().as_text()
    sizes = {
        math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)
    }
    assert 64 * runner.plan.axis_length("vocab") in sizes
    assert max(sizes) < 512 * TINY.vocab_size
