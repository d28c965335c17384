# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: rows, the queue, cancellation, KV blocks, preemption, and memory."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from mesh_model import random_tokens, shared_model
from meshwen.engine.cache_stats import CacheStats
from meshwen.engine.engine import Engine, QueueFullError
from meshwen.engine.options import EngineOptions
from meshwen.engine.request import Event, Request
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError
from test_engine import (
    BLOCK,
    PROMPTS,
    SPLIT,
    completions,
    engine,
    engine_of,
    model,
    request,
)
from tiny_model import ONE_LAYER, STEPS, TINY, greedy

pytestmark = pytest.mark.usefixtures("unoptimised")
every_mesh = pytest.mark.parametrize("mesh", ["1", SPLIT])


def tokens_of(events: list[Event]) -> dict[int, tuple[int, ...]]:
    return {e.request: e.completion.tokens for e in events if e.completion}


def drain(running: Engine) -> None:
    for _ in range(1000):  # More steps than any test takes: an engine that never ends fails.
        if not running.busy:
            return
        running.step()
    pytest.fail("the engine is still busy after 1000 steps")


LONG = random_tokens(TINY, 1, 60, seed=4)[0].tolist()  # In steps of 16 tokens, many chunks.


def in_short_steps(max_num_seqs: int) -> Engine:
    return engine_of(model().runner, max_num_seqs=max_num_seqs, max_num_batched_tokens=16)


# --- Rows


def test_a_free_row_is_filled_while_the_other_answers_go_on():
    limits = [STEPS, 1, 2, 1]
    requests = [request(p, max_new_tokens=n) for p, n in zip(PROMPTS, limits, strict=True)]
    events = list(engine(max_num_seqs=2).run(requests))
    order = [event.request for event in events]
    last_of_first = max(at for at, number in enumerate(order) if number == 0)
    assert all(order.index(number) < last_of_first for number in (1, 2))
    expected = [greedy(tuple(p))[0][:n] for p, n in zip(PROMPTS, limits, strict=True)]
    assert [c.tokens for c in completions(events)] == expected


def test_answers_go_on_between_the_chunks_of_a_long_prompt():
    running, events = in_short_steps(2), []
    first = running.submit(request(PROMPTS[0]), events.append)
    running.step()
    second = running.submit(request(LONG, max_new_tokens=1), events.append)
    drain(running)
    # 15 of its tokens beside each token of the first.
    assert [event.request for event in events] == [first] * 5 + [second, first][::1]
    expected = {first: greedy(tuple(PROMPTS[0]))[0], second: greedy(tuple(LONG))[0][:1]}
    assert tokens_of(events) == expected


def test_two_runs_on_one_engine_each_get_their_own():
    shared = engine(max_num_seqs=2)
    runs = [shared.run([request(p) for p in pair]) for pair in (PROMPTS[:2], PROMPTS[2:])]
    events = [[], []]
    for _ in range(2 * STEPS):
        for run, seen in zip(runs, events, strict=True):
            seen.append(next(run))
    assert [next(run, None) for run in runs] == [None, None]
    found = [c.tokens for seen in events for c in completions(seen)]
    assert found == [greedy(tuple(p))[0] for p in PROMPTS]


# --- The queue


def test_a_full_queue_refuses_and_run_waits_for_room():
    running, events = engine_of(model().runner, max_num_seqs=1, max_waiting=1), []
    running.submit(request(PROMPTS[0]), events.append)
    with pytest.raises(QueueFullError, match="1 requests wait"):
        running.submit(request(PROMPTS[1]), events.append)
    drain(running)
    assert list(tokens_of(events).values()) == [greedy(tuple(PROMPTS[0]))[0]]
    found = completions(running.run([request(p) for p in PROMPTS]))
    assert [c.tokens for c in found] == [greedy(tuple(p))[0] for p in PROMPTS]


def test_timings_separate_waiting_from_running():
    events = list(engine(max_num_seqs=1).run([request(p) for p in PROMPTS[:3]]))
    timings = [c.timings for c in completions(events)]
    for one in timings:
        assert 0 <= one.queue_seconds < one.time_to_first_token
        assert one.running_seconds > 0
    waited = [one.queue_seconds for one in timings]
    assert all(earlier < later for earlier, later in pairwise(waited))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_cancelled_request_gives_nothing_more_and_its_row_is_free(steps):
    running, events = engine(max_num_seqs=1), []
    numbers = [running.submit(request(p), events.append) for p in PROMPTS[:2]]
    for _ in range(steps):
        running.step()
    before = len(events)
    running.cancel(numbers[0])
    drain(running)
    assert before == len([e for e in events if e.request == numbers[0]])
    assert tokens_of(events) == {numbers[1]: greedy(tuple(PROMPTS[1]))[0]}


def test_a_request_may_be_cancelled_while_its_prompt_is_prefilled():
    running, events = in_short_steps(1), []
    number = running.submit(request(LONG), events.append)
    running.step()
    assert running.prefilled == (16, len(LONG))
    running.cancel(number)
    other = running.submit(request(PROMPTS[0]), events.append)
    drain(running)
    assert tokens_of(events) == {other: greedy(tuple(PROMPTS[0]))[0]}


def test_a_run_given_up_while_a_long_prompt_is_prefilled_leaves_room_for_a_shorter_one():
    running = in_short_steps(2)
    begun = running.run([request(PROMPTS[0]), request(LONG)])
    next(begun)
    for _ in range(2):
        running.step()
    assert running.prefilled == (16 - len(PROMPTS[0]) + 2 * 15, len(LONG))
    begun.close()
    assert not running.busy
    found = completions(running.run([request(PROMPTS[0])]))
    assert [c.tokens for c in found] == [greedy(tuple(PROMPTS[0]))[0]]


def test_answers_are_not_kept_waiting_by_a_long_queue():
    running, events = engine(max_num_seqs=4), []
    first = running.submit(request(PROMPTS[0]), events.append)
    for _ in range(60):
        running.submit(request(PROMPTS[1], max_new_tokens=1), events.append)
    drain(running)
    places = [at for at, event in enumerate(events) if event.request == first]
    assert max(later - earlier for earlier, later in pairwise(places)) <= 4
    assert tokens_of(events)[first] == greedy(tuple(PROMPTS[0]))[0]


def test_a_request_may_be_cancelled_by_who_gets_its_tokens():
    running, events = engine(max_num_seqs=2), []

    def stop_after_two(event: Event) -> None:
        events.append(event)
        if sum(e.request == event.request for e in events) == 2:
            running.cancel(event.request)

    first = running.submit(request(PROMPTS[0]), stop_after_two)
    second = running.submit(request(PROMPTS[1]), events.append)
    drain(running)
    assert sum(e.request == first for e in events) == 2
    assert tokens_of(events) == {second: greedy(tuple(PROMPTS[1]))[0]}


def test_a_step_that_breaks_off_leaves_the_engine_ready(monkeypatch):
    running, events = engine(max_num_seqs=2), []
    running.submit(request(PROMPTS[0]), events.append)
    running.step()
    with monkeypatch.context() as broken:
        broken.setattr(running._core.runner, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            running.step()
    assert not running.busy
    found = completions(running.run([request(p) for p in PROMPTS]))
    assert [c.tokens for c in found] == [greedy(tuple(p))[0] for p in PROMPTS]


def test_a_run_whose_requests_another_run_lost_raises(monkeypatch):
    shared = engine(max_num_seqs=2)
    first, second = (shared.run([request(p)]) for p in PROMPTS[:2])
    next(first)
    with monkeypatch.context() as broken:
        broken.setattr(shared._core.runner, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(second)
    with pytest.raises(MeshwenError, match="requests were lost"):
        list(first)


def test_a_cache_that_could_not_be_made_is_made_the_next_time(monkeypatch):
    running = engine(max_num_seqs=2)
    with monkeypatch.context() as broken:
        broken.setattr(running._core.runner, "empty_blocks", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(running.run([request(PROMPTS[0])]))
    found = completions(running.run([request(PROMPTS[0])]))
    assert [c.tokens for c in found] == [greedy(tuple(PROMPTS[0]))[0]]


# --- KV blocks


@every_mesh
def test_requests_join_those_that_run(mesh):
    running, events = engine(mesh, max_num_seqs=4), []
    numbers = []
    for prompt in PROMPTS:  # One row, then two and four.
        numbers.append(running.submit(request(prompt), events.append))
        running.step()
    drain(running)
    found = tokens_of(events)
    assert [found[n] for n in numbers] == [greedy(tuple(p))[0] for p in PROMPTS]


@pytest.mark.parametrize("asked", [True, False])
def test_a_ceiling_reserves_no_block(asked):
    running, events = engine(), []
    params = {"max_new_tokens": 1000, "max_new_tokens_asked": asked}
    number = running.submit(request(PROMPTS[0], **params), events.append)
    other = running.submit(request(PROMPTS[1]), events.append)
    while other not in tokens_of(events):
        running.step()
    assert running._core.blocks.used_blocks == 1
    running.cancel(number)
    running.step()
    assert running._core.blocks.used_blocks == 0


@pytest.mark.parametrize("caching", [True, False])
def test_what_prompts_begin_with_is_computed_once(caching):
    running = engine_of(model().runner, prefix_caching=caching)
    prompts = [tuple(LONG[:40]), tuple(LONG[:36]), tuple(LONG[:40])]  # A block and some more.
    found = [completions(running.run([request(p)]))[0].tokens for p in prompts]
    assert found == [greedy(p)[0] for p in prompts]
    queried, cached = (40 + 36 + 40, 2 * BLOCK) if caching else (0, 0)
    # Room for 4 sequences of 1100 tokens.
    assert running.cache_stats == CacheStats(0, 4 * 35, queried, cached, 0, 0)
    with running.run([request(PROMPTS[0], max_new_tokens=9)]) as events:
        next(events)
        assert running.cache_stats.used_blocks == 1


def engine_with_blocks(count: int, max_num_seqs: int = 2, runner=None, **options) -> Engine:
    """An engine that has so many blocks for each part of the batch."""
    runner = runner or model().runner
    plan = EngineOptions(max_num_seqs=max_num_seqs).cache_plan(runner.model)
    return Engine(runner, None, (), replace(plan, num_blocks=1 + count), **options)


PENALIZED = {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.5}


@pytest.mark.parametrize(
    ("mesh", "numerics", "sampling"), [(SPLIT, "fast", {}), ("1", "exact", PENALIZED)]
)
def test_sequences_give_way_where_blocks_run_out_and_go_on_as_they_would_have(
    mesh, numerics, sampling
):
    runner = shared_model(ONE_LAYER, mesh, numerics=numerics).runner
    requests = [
        request(prompt, max_new_tokens=BLOCK + 2, logprobs=True, **sampling)
        for prompt in PROMPTS[:3]
    ]
    expected = completions(engine_with_blocks(9, 4, runner).run(requests))
    running = engine_with_blocks(3, 4, runner)  # Two sequences begin, and come to need two each.
    events = list(running.run(requests))
    core = running._core
    assert running.cache_stats.preemptions == core.scheduler.preemptions > 0
    assert core.blocks.used_blocks == 0
    for number, (found, other) in enumerate(zip(completions(events), expected, strict=True)):
        assert found.tokens == other.tokens
        assert found.tokens == tuple(e.token for e in events if e.request == number)
        tolerance = 0 if numerics == "exact" else 1e-4
        np.testing.assert_allclose(found.logprobs, other.logprobs, rtol=0, atol=tolerance)


# --- Memory and limits


def test_max_model_len_limits_prompt_and_answer():
    limited = Engine(
        model().runner,
        None,
        (),
        EngineOptions(max_num_seqs=6, max_model_len=8).cache_plan(model().runner.model),
    )
    (found,) = completions(limited.run([request(PROMPTS[0], max_new_tokens=50)]))
    assert found.tokens == greedy(tuple(PROMPTS[0]))[0][:3]
    assert found.finish_reason == "length"
    with pytest.raises(MeshwenError, match=r"^prompt 1 has 17 tokens, but the max_model_len is 8"):
        limited.run([request(PROMPTS[2])])


SHORT = Request((1, 2), SamplingParams(temperature=0, max_new_tokens=3))


def test_a_prompt_that_there_are_too_few_blocks_for_waits_and_is_not_overtaken():
    running, events = engine_with_blocks(6, max_num_seqs=4), []
    first = [running.submit(SHORT, events.append) for _ in range(2)]
    running.step()
    long = running.submit(request(LONG + LONG[:10]), events.append)  # Three blocks.
    last = running.submit(SHORT, events.append)
    drain(running)
    ended = [event.request for event in events if event.completion]
    assert (sorted(ended[:2]), ended[2:]) == (first, [last, long])  # Those two at the same time.
    begun = list(dict.fromkeys(event.request for event in events))
    assert begun == [*first, long, last]
    assert tokens_of(events)[long] == greedy(tuple(LONG + LONG[:10]))[0]


def test_a_request_that_there_is_no_memory_for_at_all_is_refused_by_itself():
    running, events = engine_with_blocks(2), []
    with pytest.raises(MeshwenError, match="KV cache"):
        running.submit(request([1] * 64), events.append)
    with pytest.raises(MeshwenError, match="KV cache"):
        running.run([SHORT, request([1] * 64)])
    number = running.submit(SHORT, events.append)
    drain(running)
    assert list(tokens_of(events)) == [number]


def test_a_ceiling_that_nobody_asked_for_ends_an_answer_where_memory_does(caplog):
    running, params = engine_with_blocks(2), {"max_new_tokens": 1000}
    with pytest.raises(MeshwenError, match="KV cache"):
        running.run([request(PROMPTS[0], **params)])
    asked = [request(p, **params, max_new_tokens_asked=False) for p in PROMPTS[:2]]
    found = completions(running.run([*asked, SHORT]))
    assert [len(c.prompt_tokens) + len(c.tokens) for c in found] == [64, 64, 5]
    assert {c.finish_reason for c in found} == {"length"}
    assert [c.tokens[:STEPS] for c in found[:2]] == [greedy(tuple(p))[0] for p in PROMPTS[:2]]
    warned = [r.getMessage() for r in caplog.records if "an answer ended" in r.getMessage()]
    assert len(warned) == 1
    length = len(asked[0].prompt_tokens)
    assert f"ended after {64 - length} of the 1000 tokens" in warned[0]
    assert "more than 64, the prompt's included" in warned[0]


def test_an_answer_that_its_length_ends_is_not_said_to_lack_memory(caplog):
    running = engine_with_blocks(2)
    (found,) = completions(running.run([request(PROMPTS[0], max_new_tokens=40, max_length=8)]))
    assert (len(found.tokens), found.finish_reason) == (3, "length")
    assert not [r for r in caplog.records if "an answer ended" in r.getMessage()]


def test_who_fails_to_take_a_token_loses_its_own_request_alone():
    running, events = engine(max_num_seqs=2), []

    def fails(event: Event) -> None:
        raise OSError("gone")

    first = running.submit(request(PROMPTS[0]), events.append)
    running.submit(request(PROMPTS[1]), fails)
    raised = 0
    while running.busy:
        try:
            running.step()
        except OSError:
            raised += 1
    assert raised == 1
    assert tokens_of(events) == {first: greedy(tuple(PROMPTS[0]))[0]}
