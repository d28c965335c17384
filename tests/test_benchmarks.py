# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks/` measures engines by, with an engine whose steps take as long as it says."""

import importlib
from pathlib import Path

import pytest

ENGINES = Path(__file__).parent.parent / "benchmarks" / "engines"


@pytest.fixture
def stepping(monkeypatch):
    monkeypatch.syspath_prepend(ENGINES)
    return importlib.import_module("stepping")


@pytest.fixture
def fake(stepping, monkeypatch):
    """Reads a chunk of 4 tokens of the oldest prompt a step, for a second each, and then decodes.

    A decode step takes 0.01 s. Answers are 7, 8, 9, ...; what prompts begin with is cached where an
    earlier one, with its answer, began so.
    """

    class Fake(stepping.Stepping):
        def __init__(self):
            self.now, self.live, self.read, self.ends = 0.0, [], [], None

        def submit(self, prompt, limit, *, whole=False, stop=()):
            answer = stepping.Answer(len(self.live), len(prompt))
            same = [sum(1 for _ in common(prompt, other)) for other in self.read]
            answer.cached = max(same, default=0)
            self.live.append([answer, list(prompt), limit, len(prompt) - answer.cached])
            return answer

        def step(self):
            waiting = next((one for one in self.live if one[3] > 0 and not one[0].done), None)
            running = [one for one in self.live if one[3] <= 0 and not one[0].done]
            if waiting:
                self.now += 1.0
                waiting[3] -= 4
                if waiting[3] <= 0:
                    running.append(waiting)
            self.now += 0.01
            for answer, prompt, limit, _ in running:
                answer.add([7 + len(answer.tokens)])
                answer.done = len(answer.tokens) in (limit, self.ends)
                if answer.done:
                    self.read.append(prompt + answer.tokens)

        def cancel(self, answer):
            answer.done = True

    engine = Fake()
    monkeypatch.setattr("time.perf_counter", lambda: engine.now)
    return engine


def common(one, other):
    for a, b in zip(one, other, strict=False):
        if a != b:
            return
        yield a


def test_prompts_differ_from_their_beginning_on(stepping):
    prompts = [tuple(stepping.random_prompt(16)) for _ in range(50)]
    assert {len(prompt) for prompt in prompts} == {16}
    assert len(set(prompts)) == 50


def test_decode_steps_begin_when_sequences_have_the_tokens_asked_for(fake):
    found = fake.decode_steps(batch=4, length=16, steps=3)
    # Prompts of 8 tokens take two steps each, so that the first answer has seven at the end.
    assert found == {"seconds": pytest.approx(0.01), "context": 16}
    assert all(answer.done for answer, *_ in fake.live)


def test_an_answer_that_ends_in_between_is_an_error(fake):
    fake.ends = 10
    with pytest.raises(RuntimeError, match=r"5 steps gave answers"):
        fake.decode_steps(batch=2, length=16, steps=3)


def test_a_prompt_that_was_read_before_is_measured_apart(fake):
    assert fake.prefill(length=8, runs=3) == pytest.approx(2.02)
    assert fake.prefill_again(length=8, runs=3) == pytest.approx(0.01)


def test_a_chat_goes_on_with_the_engines_own_answers(fake):
    found = fake.chat(conversations=[[[50], [51]], [[60, 61], [62], [63]]], limit=3)
    assert found["prompt_tokens"] == [2, 6, 10]
    assert found["cached_tokens"] == [0, 5, 9]
    assert found["seconds"] == found["first_token_seconds"][-1] == pytest.approx(1.01)
    assert [prompt for _, prompt, *_ in fake.live][-1] == [60, 61, 7, 8, 9, 62, 7, 8, 9, 63]


def test_answers_are_counted_without_those_that_warm_up(fake):
    found = fake.answer([[1, 2, 3, 4], [1, 2, 3, 4, 5]], [[9, 9]], limit=5, stop=[])
    assert (found["tokens"], found["prompt_tokens"]) == (10, 9)
    assert found["computed_tokens"] == 9
    again = fake.answer([[1, 2, 3, 4, 6]], [], limit=5, stop=[])
    assert (again["cached_tokens"], again["computed_tokens"]) == (4, 1)
    assert found["tokens_per_second"] == pytest.approx(10 / found["seconds"])


def test_gaps_are_those_of_running_answers_while_prompts_are_read(fake):
    found = fake.arrivals(running=3, prompts=2, length=40)
    assert found["quiet_p50"] == pytest.approx(0.01)
    assert found["p50"] == found["max"] == pytest.approx(1.01)
    assert found["first_token_seconds"] == pytest.approx([10.1, 20.2])


def test_a_gap_counts_where_it_ends(stepping):
    answer = stepping.Answer(0, 1, times=[1.0, 2.0, 5.0, 6.0])
    assert stepping._gaps([answer], 3.0, 5.5) == [3.0]


def test_meshwen_is_measured_through_its_public_api(monkeypatch, stepping):
    monkeypatch.setattr("meshwen.runtime.compilation_cache.enable_compilation_cache", lambda: None)
    engine = importlib.import_module("with_meshwen").load("demo", "float32", 2)
    prompts = [[11, 15, 16], [11, 15, 17, 18]]
    found = engine.answer(prompts, [[20]], limit=3, stop=[])
    expected = engine.model.generate(prompts, max_new_tokens=3, temperature=0)
    assert found["tokens"] == sum(len(one.tokens) for one in expected)
    assert found["prompt_tokens"] == 7
    [answer] = engine._finish([engine.submit(prompts[0], 40, whole=True)])
    assert len(answer.tokens) == 40
