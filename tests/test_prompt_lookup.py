# SPDX-License-Identifier: Apache-2.0
"""Guesses from what came before: what is guessed, and that no answer depends on it."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from mesh_model import shared_model
from meshwen.cache.budget import Capacity
from meshwen.engine.engine import Engine
from meshwen.engine.prompt_lookup import PromptLookup
from meshwen.engine.request import Completion, Request
from meshwen.engine.runner import ModelRunner
from meshwen.engine.sampling_params import SamplingParams
from meshwen.engine.sequence import SequenceState
from meshwen.errors import MeshwenError
from tiny_model import ONE_LAYER

GREEDY = SamplingParams(max_new_tokens=40, temperature=0, logprobs=True)
SAMPLED = SamplingParams(max_new_tokens=40, temperature=0.7, top_p=0.9, seed=3, logprobs=True)
WHOLE = SamplingParams(max_new_tokens=30, temperature=0.4, seed=5, logprobs=True)
CONTEXT = 70
PENALIZED = SamplingParams(max_new_tokens=20, temperature=0, repetition_penalty=1.2)


def test_what_followed_the_last_tokens_is_guessed_to_follow_again():
    assert PromptLookup([1, 2, 3, 4, 5, 6, 9, 2, 3]).guesses(3) == [4, 5, 6]


def test_longer_runs_and_later_places_come_first():
    assert PromptLookup([1, 2, 3, 7, 8, 2, 3, 9, 1, 2, 3]).guesses(2) == [7, 8]
    assert PromptLookup([2, 3, 7, 7, 2, 3, 9, 9, 2, 3]).guesses(2) == [9, 9]


def test_nothing_is_guessed_where_nothing_was_there_before():
    assert PromptLookup([]).guesses(4) == []
    assert PromptLookup([5]).guesses(4) == []
    assert PromptLookup([1, 2, 3, 4]).guesses(4) == []


def test_a_run_that_repeats_itself_is_guessed_to_go_on():
    assert PromptLookup([1, 2, 3, 1, 2, 3, 1, 2]).guesses(7) == [3, 1, 2, 3, 1, 2, 3]
    assert PromptLookup([4, 4, 4]).guesses(3) == [4, 4, 4]


def test_tokens_that_are_drawn_are_looked_up_too():
    lookup = PromptLookup([1, 2])
    for token in (8, 9, 1, 2):
        lookup.push(token)
    assert lookup.guesses(2) == [8, 9]


def test_wrong_guesses_make_it_rest_longer_each_time_and_right_ones_end_that():
    lookup = PromptLookup([4, 4, 4])

    def steps_until_the_next() -> int:
        return next(n for n in range(100) if lookup.guesses(1))

    rests = []
    for _ in range(8):
        lookup.judge(0)
        rests.append(steps_until_the_next())
    assert rests == [1, 3, 7, 15, 31, 32, 32, 32]
    lookup.judge(1)
    assert steps_until_the_next() == 0


class CountingRunner:
    """A runner that notes the tokens a sequence has in each decode step."""

    def __init__(self, runner: ModelRunner):
        self._runner, self.steps = runner, []

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def decode(self, cache, tokens, *rest):
        self.steps.append(tokens.shape[1])
        return self._runner.decode(cache, tokens, *rest)


def run(prompts, sampling, guessed, mesh="1", rows=2, dtype=np.float32, config=ONE_LAYER, eos=()):
    """Completions by request in exact numerics, and the tokens of each step.

    `sampling` is that of all prompts, or a list of each one's.
    """
    runner = CountingRunner(shared_model(config, mesh, dtype, "exact").runner)
    capacity = Capacity.of(runner.plan, runner.dtype, rows, CONTEXT)
    engine = Engine(runner, None, eos, capacity, prompt_lookup_num_tokens=guessed)
    each = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
    requests = [Request(tuple(p), one) for p, one in zip(prompts, each, strict=True)]
    done = {e.request: e.completion for e in engine.run(requests) if e.completion}
    return [done[i] for i in range(len(prompts))], runner.steps


def repeating(length: int, seed: int) -> list[int]:
    part = np.random.default_rng(seed).integers(0, ONE_LAYER.vocab_size, 7).tolist()
    return (part * 20)[:length]


# Of few lengths: all tests share two rows of one cache, and what is compiled for it.
PROMPTS = [repeating(25, 0), [7, 8, 9], repeating(32, 1), repeating(28, 2), [3] * 30]


def guess_from(answers: list[Completion], wrong: int):
    """In the place of `SequenceState.guesses`: those answers, one token in `wrong` changed."""

    def guesses(sequence: SequenceState, count: int) -> list[int]:
        answer = answers[sequence.number].tokens
        at = len(sequence.tokens)
        found = [
            (token + (i % wrong == 0)) % ONE_LAYER.vocab_size
            for i, token in enumerate([*answer, *[0] * count])
        ]
        return found[at : at + count]

    return guesses


# Another kind of layer, and heads that kernels need not pad.
WIDE = replace(ONE_LAYER, head_dim=32, layer_types=("full_attention",))


@pytest.mark.parametrize(
    ("mesh", "dtype", "config", "sampling"),
    [
        ("1", np.float32, ONE_LAYER, GREEDY),
        ("1", np.float32, ONE_LAYER, SAMPLED),
        ("data=2,model=2", jnp.bfloat16, WIDE, WHOLE),
    ],
    ids=["greedy", "top-p", "whole, on a mesh"],
)
def test_exact_answers_are_the_same_to_the_bit_and_take_fewer_steps(
    mesh, dtype, config, sampling, monkeypatch
):
    plain, steps = run(PROMPTS, sampling, 0, mesh, dtype=dtype, config=config)
    monkeypatch.setattr(SequenceState, "judge", lambda *_: None)
    for wrong in (4, 7, 100):
        monkeypatch.setattr(SequenceState, "guesses", guess_from(plain, wrong))
        guessed, fewer = run(PROMPTS, sampling, 5, mesh, dtype=dtype, config=config)
        assert [c.tokens for c in guessed] == [c.tokens for c in plain]
        assert [c.logprobs for c in guessed] == [c.logprobs for c in plain]
        assert set(steps) == {1}
        assert 6 in fewer
        assert len(fewer) < 0.5 * len(steps)


def test_guesses_that_are_looked_up_change_no_exact_answer():
    plain, steps = run(PROMPTS, GREEDY, 0)
    guessed, fewer = run(PROMPTS, GREEDY, 5)
    assert [c.tokens for c in guessed] == [c.tokens for c in plain]
    assert [c.logprobs for c in guessed] == [c.logprobs for c in plain]
    assert {1, 6} == set(fewer)
    assert len(fewer) < len(steps)


def test_a_stop_or_a_limit_amid_guesses_ends_an_answer_there():
    (plain, *_), _ = run([[3] * 30] * 2, GREEDY, 0)
    limits = [replace(GREEDY, max_new_tokens=limit) for limit in range(1, 9)]
    found, steps = run([[3] * 30] * 9, [GREEDY, *limits], 5)
    assert 6 in steps
    for one, sampling in zip(found[1:], limits, strict=True):
        assert one.tokens == plain.tokens[: sampling.max_new_tokens]
        assert one.finish_reason == "length"
    end = plain.tokens[20]
    found, _ = run([[3] * 30] * 2, GREEDY, 5, eos=[end])
    for one in found:
        assert one.tokens == plain.tokens[: plain.tokens.index(end) + 1]
        assert one.finish_reason == "stop"


def test_an_answer_may_reach_the_end_of_the_context_with_guesses():
    prompts = [repeating(32, 4)] * 2
    (plain, *_), _ = run(prompts, replace(GREEDY, max_new_tokens=200), 0)
    (guessed, *_), steps = run(prompts, replace(GREEDY, max_new_tokens=200), 15)
    assert 16 in steps
    assert len(plain.tokens) == CONTEXT - 32
    assert guessed.tokens == plain.tokens


def test_nothing_is_guessed_with_a_repetition_penalty_or_for_many_answers():
    plain, _ = run(PROMPTS, PENALIZED, 0)
    found, steps = run(PROMPTS, PENALIZED, 5)
    assert [c.tokens for c in found] == [c.tokens for c in plain]
    assert set(steps) == {1}
    _, steps = run([repeating(20, i) for i in range(8)], GREEDY, 5, rows=8)
    assert set(steps) == {1}


@pytest.mark.parametrize("guessed", [-1, 16])
def test_more_guesses_than_there_can_be_are_refused(guessed):
    with pytest.raises(MeshwenError, match="prompt_lookup_num_tokens must be from 0 to 15"):
        run([[1]], GREEDY, guessed)
