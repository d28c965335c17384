# SPDX-License-Identifier: Apache-2.0
"""One model, many callers: threads, event loops, callbacks and interleaved generators."""

import asyncio
import re
import threading
from itertools import cycle, islice

import numpy as np
import pytest

from mesh_model import random_tokens
from meshwen import Qwen2ForCausalLM
from meshwen.engine.engine import Engine
from meshwen.engine.options import EngineOptions
from meshwen.errors import MeshwenError
from speller import write_speller
from test_engine import SPLIT, completions, engine, model, request
from test_engine_batching import drain
from threads import PATIENCE, results, start, wait_until
from tiny_model import STEPS, TINY, greedy

pytestmark = pytest.mark.usefixtures("unoptimised")
# In sum they fit the smallest shape bucket, so that few programs are compiled.
PROMPTS = [tuple(random_tokens(TINY, 1, n, seed=n)[0].tolist()) for n in (5, 1, 7, 3)]


def tiny(mesh="1") -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(model(mesh).runner, None, {}, EngineOptions(max_num_seqs=4))


def tokens(events) -> list[tuple[int, ...]]:
    return [completion.tokens for completion in completions(events)]


def queued(shared: Engine, count: int) -> None:
    """Waits until so many callers wait for the lock, or hold it."""
    wait_until(lambda: len(shared._shared.lock._queue) == count)


# --- The right tokens


def test_200_calls_from_4_threads_give_each_its_own_tokens():
    shared = tiny()

    def ask(first: int) -> list[bool]:
        asked = islice(cycle(PROMPTS), first, first + 50)
        return [
            shared.generate(prompt, max_new_tokens=STEPS, temperature=0)[0].tokens
            == greedy(prompt)[0]
            for prompt in asked
        ]

    assert results([start(ask, n) for n in range(4)]) == [[True] * 50] * 4
    assert not shared.engine.busy


def test_callers_share_the_batch(monkeypatch):
    shared, calls = engine(), []
    runner = shared._core.runner
    step = runner.step
    monkeypatch.setattr(runner, "step", lambda *a: calls.append(1) or step(*a))
    with shared.exclusive():
        asked = [start(list, shared.run([request(p)])) for p in PROMPTS]
        queued(shared, 5)
    assert [tokens(events) for events in results(asked)] == [[greedy(p)[0]] for p in PROMPTS]
    assert len(calls) < 2 * STEPS  # One after the other they take four times as many.


@pytest.mark.parametrize("mesh", ["1", SPLIT])
def test_logits_may_be_asked_for_while_answers_run(mesh):
    shared, ids = tiny(mesh), np.array([PROMPTS[0]])
    expected = np.asarray(shared(ids))

    def logits() -> list[bool]:
        return [np.array_equal(shared(ids), expected) for _ in range(20)]

    def answers() -> list[bool]:
        found = [shared.generate(p, max_new_tokens=STEPS) for p in PROMPTS]
        return [one.tokens == greedy(p)[0] for p, (one,) in zip(PROMPTS, found, strict=True)]

    found = results([start(logits), start(answers), start(logits), start(answers)])
    assert found == [[True] * 20, [True] * 4] * 2


def test_logits_wait_until_no_step_runs():
    shared = tiny()
    with shared.engine.exclusive():
        asked = start(shared, np.array([PROMPTS[0]]))
        queued(shared.engine, 2)
        assert not asked.done()
    assert asked.result(PATIENCE).shape == (1, len(PROMPTS[0]), TINY.vocab_size)


def test_streams_in_one_thread_advance_interleaved_and_unequally():
    shared = tiny()
    streams = [shared.events(p, max_new_tokens=STEPS, temperature=0) for p in PROMPTS[:2]]
    begun = [next(streams[0]) for _ in range(3)]
    others = list(streams[1])
    assert tokens(others) == [greedy(PROMPTS[1])[0]]
    assert tokens([*begun, *streams[0]]) == [greedy(PROMPTS[0])[0]]


def test_one_stream_may_be_shared_by_threads():
    shared = engine()
    events = shared.run([request(p) for p in PROMPTS])
    found = [event for some in results([start(list, events) for _ in range(3)]) for event in some]
    assert sorted(tokens(found)) == sorted(greedy(p)[0] for p in PROMPTS)
    assert len(found) == STEPS * len(PROMPTS)


# --- Giving up


@pytest.mark.parametrize("give_up", ["close", "drop", "with"])
def test_who_gives_up_a_stream_frees_its_row(give_up):
    shared = tiny()
    events = shared.events(PROMPTS[0], max_new_tokens=500)
    next(events)
    assert shared.engine.busy
    if give_up == "close":
        assert start(events.close).exception(PATIENCE) is None
        assert list(events) == []
    elif give_up == "with":
        with events:
            next(events)
    del events
    assert not shared.engine.busy
    (found,) = shared.generate(PROMPTS[1], max_new_tokens=STEPS, temperature=0)
    assert found.tokens == greedy(PROMPTS[1])[0]


def test_closing_a_stream_wakes_who_waits_for_it():
    shared = engine()
    events = shared.run([request(PROMPTS[0])])
    with shared.exclusive():  # So that no step can end its waiting.
        waiting = start(list, events)
        queued(shared, 2)
        events.close()
        assert waiting.result(PATIENCE) == []


def test_cancellations_from_a_thread_disturb_no_other():
    shared, stop = engine(), threading.Event()

    def disturb() -> int:
        dropped = 0
        while not stop.is_set():
            number = shared.submit(request(PROMPTS[1]), lambda event: None)
            shared.cancel(number)
            events = shared.run([request(PROMPTS[2])])
            next(events)
            del events
            dropped += 1
        return dropped

    disturbing = start(disturb)

    def ask() -> list:
        return [tokens(shared.run([request(p)])) for p in PROMPTS * 3]

    found = results([start(ask) for _ in range(2)])
    stop.set()
    assert found == [[[greedy(p)[0]] for p in PROMPTS * 3]] * 2
    assert disturbing.result(PATIENCE) > 0
    assert not shared.busy


# --- Errors reach those whom they concern


def test_what_a_callback_raises_reaches_step_and_no_reader():
    shared = engine()

    def fails(event) -> None:
        raise OSError("gone")

    for _ in range(2):
        shared.submit(request(PROMPTS[1]), fails)
    assert tokens(shared.run([request(PROMPTS[0])])) == [greedy(PROMPTS[0])[0]]
    assert shared.busy  # There is something to raise.
    with pytest.raises(OSError, match="gone") as error:
        shared.step()
    assert error.value.__notes__ == ["another request failed too: OSError('gone')"]
    assert not shared.busy


def from_generate(shared, asked):
    return shared.generate(list(PROMPTS[:2]), **asked)


def from_a_stream(shared, asked):
    return list(shared.stream(PROMPTS[1], **asked))


def from_an_event_loop(shared, asked):
    async def run():
        return [event async for event in shared.events(PROMPTS[1], **asked)]

    return asyncio.run(run())


@pytest.mark.parametrize("ask", [from_generate, from_a_stream, from_an_event_loop])
def test_a_text_that_cannot_be_made_is_an_error_of_the_call_that_asked_for_it(ask, monkeypatch):
    shared, submitted = tiny(), []
    broken = ValueError("no such\ncharacter")

    def push(text, token):
        if token == greedy(PROMPTS[1])[0][2]:
            raise broken
        return ""

    number = shared.engine.submit(request(PROMPTS[3]), submitted.append)
    monkeypatch.setattr("meshwen.engine.answer_text.AnswerText.push", push)
    error = start(ask, shared, {"max_new_tokens": STEPS, "temperature": 0}).exception(PATIENCE)
    assert isinstance(error, MeshwenError)
    assert re.fullmatch(
        r"prompt \d: a token of its answer could not be delivered: ValueError\(.*\)", str(error)
    )
    assert error.__cause__ is broken
    while shared.engine.busy:  # What others asked for goes on.
        shared.engine.step()
    assert [event.request for event in submitted] == [number] * STEPS


def test_a_step_that_breaks_off_is_reported_to_all_whose_requests_it_took(monkeypatch):
    shared = engine()
    with monkeypatch.context() as broken:
        broken.setattr(shared._core.runner, "step", lambda *_: 1 / 0)
        with shared.exclusive():
            asked = [start(list, shared.run([request(p)])) for p in PROMPTS]
            shared.submit(request(PROMPTS[0]), lambda event: None)
            queued(shared, 5)
        found = results(asked)
    lost = [one for one in found if isinstance(one, MeshwenError)]
    assert [type(one) for one in found if one not in lost] == [ZeroDivisionError]
    assert len({id(one) for one in lost}) == 3
    assert all(isinstance(one.__cause__, ZeroDivisionError) for one in lost)
    with pytest.raises(MeshwenError, match="requests were lost"):
        shared.step()
    assert tokens(shared.run([request(PROMPTS[0])])) == [greedy(PROMPTS[0])[0]]


@pytest.mark.parametrize("at", [0, 1])  # When prompts are prefilled, and later.
def test_an_interrupted_step_ends_only_the_requests_of_who_took_it(at, monkeypatch):
    shared, calls = engine(), []
    whole = shared._core.runner.step

    def once(*arguments):
        calls.append(1)
        if len(calls) == 1 + at:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(shared._core.runner, "step", once)
    with shared.exclusive():
        asked = [start(list, shared.run([request(p)])) for p in PROMPTS]
        queued(shared, 5)
    found = results(asked)
    (ended,) = [n for n, one in enumerate(found) if isinstance(one, KeyboardInterrupt)]
    expected = [[greedy(p)[0]] for p in PROMPTS]
    del found[ended], expected[ended]
    assert [tokens(events) for events in found] == expected
    assert not shared.busy


def test_an_interrupted_callback_loses_its_own_request_alone():
    shared, found = engine(), []

    def interrupted(event) -> None:
        raise KeyboardInterrupt

    shared.submit(request(PROMPTS[0]), found.append)
    shared.submit(request(PROMPTS[1]), interrupted)
    with pytest.raises(KeyboardInterrupt):
        drain(shared)
    drain(shared)
    assert found[-1].completion.tokens == greedy(PROMPTS[0])[0]


def test_what_a_callback_raises_is_not_lost_with_an_interrupted_step():
    shared, seen = engine(), []

    def fails(event) -> None:
        seen.append(event)
        if len(seen) == 3:
            raise ZeroDivisionError

    def interrupted(event) -> None:
        if len(seen) == 3:  # In the same step, and after it.
            raise KeyboardInterrupt

    shared.submit(request(PROMPTS[0]), fails)
    shared.submit(request(PROMPTS[1]), interrupted)
    with pytest.raises(KeyboardInterrupt):
        drain(shared)
    with pytest.raises(ZeroDivisionError):
        shared.step()
    assert not shared.busy


def test_a_request_that_comes_while_a_step_breaks_off_is_not_lost(monkeypatch):
    shared = engine()
    entered, leave = threading.Event(), threading.Event()

    def breaks(*_) -> None:
        entered.set()
        assert leave.wait(PATIENCE)
        raise ZeroDivisionError

    with monkeypatch.context() as broken:
        broken.setattr(shared._core.runner, "step", breaks)
        first = start(list, shared.run([request(PROMPTS[0])]))
        assert entered.wait(PATIENCE)
        second = start(list, shared.run([request(PROMPTS[1])]))
        queued(shared, 2)
    leave.set()
    assert isinstance(first.exception(PATIENCE), ZeroDivisionError)
    assert tokens(second.result(PATIENCE)) == [greedy(PROMPTS[1])[0]]


def test_a_callback_may_submit_and_is_refused_a_step():
    shared, found, refused = tiny(), [], []

    def on_event(event) -> None:
        if event.completion is None:
            return
        shared.engine.submit(request(PROMPTS[1]), found.append)
        for call in (
            shared.engine.step,
            lambda: shared.generate(PROMPTS[0]),
            lambda: shared([[1, 2]]),
        ):
            with pytest.raises(MeshwenError, match="from within one of its own steps") as error:
                call()
            refused.append(error)

    shared.engine.submit(request(PROMPTS[0]), on_event)
    for _ in range(5 * STEPS):
        shared.engine.step()
    assert len(refused) == 3
    assert found[-1].completion.tokens == greedy(PROMPTS[1])[0]
    assert not shared.engine.busy


def test_a_mesh_of_several_processes_is_for_one_thread():
    shared = engine()
    shared._shared.one_thread = True  # As where `plan.mesh.is_multi_process`.
    events = shared.run([request(PROMPTS[0])])
    first = next(events)
    others = (
        lambda: next(shared.run([request(PROMPTS[1])])),
        lambda: shared.submit(request(PROMPTS[1]), print),
        shared.step,
        lambda: shared.cancel(0),
        lambda: next(events),
    )
    for error in results([start(call) for call in others]):
        assert str(error).startswith("the mesh spans several processes")
        assert "\n" not in str(error)
    assert tokens([first, *events]) == [greedy(PROMPTS[0])[0]]
    ended = start(lambda: tokens(shared.run([request(PROMPTS[1])])))
    assert ended.result(PATIENCE) == [greedy(PROMPTS[1])[0]]  # One after the other is well.


# --- Event loops


def test_async_for_gives_what_for_does_and_shares_the_batch():
    shared = tiny()

    async def one(prompt) -> tuple[int, ...]:
        found = [e async for e in shared.events(prompt, max_new_tokens=STEPS, temperature=0)]
        return found[-1].completion.tokens

    async def all_of_them():
        return await asyncio.wait_for(asyncio.gather(*map(one, PROMPTS * 5)), PATIENCE)

    assert asyncio.run(all_of_them()) == [greedy(p)[0] for p in PROMPTS * 5]


def test_a_cancelled_task_gives_up_its_request_and_no_other():
    shared = tiny()

    async def endless() -> None:
        async for _ in shared.events(PROMPTS[0], max_new_tokens=1000):
            pass

    async def run():
        task = asyncio.create_task(endless())
        while not shared.engine.busy:
            await asyncio.sleep(0.001)
        asked = asyncio.to_thread(shared.generate, PROMPTS[1], max_new_tokens=STEPS, temperature=0)
        (found,) = await asyncio.wait_for(asked, PATIENCE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return found.tokens

    assert asyncio.run(run()) == greedy(PROMPTS[1])[0]
    assert not shared.engine.busy


# --- Text


def test_text_is_made_right_in_any_thread(tmp_path):
    tokenizer = Qwen2ForCausalLM.from_pretrained(
        write_speller(tmp_path / "speller"), dtype="float32"
    ).tokenizer

    def texts(name: int) -> list[str]:
        found = []
        for n in range(50):
            message = f"{name} \N{CHRISTMAS TREE} {n}" * (n % 5 + 1)
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": message}])
            ids, decoder = tokenizer.encode(message), tokenizer.stream_decoder()
            pieces = "".join(map(decoder.push, ids)) + decoder.finish()
            found += [message in prompt, tokenizer.decode(ids) == message == pieces]
        return found

    assert results([start(texts, n) for n in range(4)]) == [[True] * 100] * 4
