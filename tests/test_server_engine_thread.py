# SPDX-License-Identifier: Apache-2.0
"""The engine's thread: what is asked for, what comes, what is cancelled, and what fails."""

import asyncio
import threading
from contextlib import asynccontextmanager

import pytest

from meshwen.engine.engine import QueueFullError
from meshwen.engine.request import Request
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError
from meshwen.server.engine_thread import EngineThread, Meter
from meshwen.server.errors import ApiError
from serving import EOS, PATIENCE, ScriptedEngine, in_loop, tokenizer

TEXT = "one two three"
TOKENS = [*tokenizer().encode(TEXT), EOS]


def request(**sampling) -> Request:
    return Request((1, 2, 3), SamplingParams(**sampling))


@asynccontextmanager
async def started(engine: ScriptedEngine, max_queue: int = 100, **more):
    thread = EngineThread(engine, max_queue, engine.slots, **more)
    thread.start()
    try:
        yield thread
    finally:
        engine.go.set()
        await asyncio.wait_for(thread.close(), PATIENCE)


async def until(condition) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.001)


async def tokens(answers, choice: int = 0) -> list[int]:
    return [e.token async for events in answers for e in events if e.choice == choice]


@in_loop
async def test_events_come_in_order_and_each_once():
    engine = ScriptedEngine(TEXT)
    async with started(engine) as thread, thread.answering(request()) as answers:
        steps = [events async for events in answers]
    assert [[event.token for event in events] for events in steps] == [[t] for t in TOKENS]
    assert [events[0].completion is None for events in steps] == [True] * (len(steps) - 1) + [False]
    assert answers.ended
    assert engine.cancelled == []


@in_loop
async def test_requests_run_side_by_side_each_with_its_own_events():
    engine = ScriptedEngine(lambda request, choice: "abc"[request.prompt_tokens[0]] * 9)
    async with started(engine) as thread:

        async def ask(number: int) -> list[int]:
            one = Request((number,), SamplingParams())
            async with thread.answering(one) as answers:
                return await tokens(answers)

        found = await asyncio.gather(*(ask(number) for number in range(3)))
    assert found == [[*tokenizer().encode(letter * 9), EOS] for letter in "abc"]


@in_loop
async def test_answers_end_with_the_last_of_several_choices():
    engine = ScriptedEngine(lambda request, choice: "x" * (2 + 5 * choice))
    async with started(engine) as thread, thread.answering(request(n=3)) as answers:
        events = [one async for step in answers for one in step]
    for choice in range(3):
        mine = [one for one in events if one.choice == choice]
        assert [one.token for one in mine] == [*tokenizer().encode("x" * (2 + 5 * choice)), EOS]
        assert [one.completion is not None for one in mine].count(True) == 1
    assert engine.cancelled == []


@in_loop
async def test_no_step_blocks_the_event_loop():
    engine = ScriptedEngine(TEXT)
    engine.go.clear()
    async with started(engine) as thread, thread.answering(request()) as answers:
        await until(lambda: thread.running)
        for _ in range(100):
            await asyncio.sleep(0)
        assert engine.steps == 0
        engine.go.set()
        assert await tokens(answers) == TOKENS


@in_loop
async def test_what_is_dropped_before_the_thread_took_it_is_never_submitted():
    engine = ScriptedEngine(TEXT)
    engine.go.clear()
    async with started(engine) as thread, thread.answering(request()) as answers:
        await until(lambda: engine.requests)  # The thread is in a step now.
        async with thread.answering(request(seed=7)):
            pass
        engine.go.set()
        assert await tokens(answers) == TOKENS
        assert [one.sampling.seed for one in engine.requests] == [0]


@in_loop
async def test_a_request_that_waits_is_cancelled_too():
    engine = ScriptedEngine("word " * 400, slots=1)
    engine.pause = 0.002
    async with started(engine) as thread, thread.answering(request(max_new_tokens=1000)) as first:
        async for _ in first:
            break
        async with thread.answering(request()) as second:
            await until(lambda: len(engine.requests) == 2)
        await until(lambda: engine.cancelled)
        assert engine.cancelled == [1]
        assert not second.begun
        assert not first.ended


@in_loop
async def test_a_running_request_is_cancelled_within_a_step():
    engine = ScriptedEngine("word " * 400)
    async with started(engine) as thread:
        async with thread.answering(request(max_new_tokens=1000)) as answers:
            async for _ in answers:
                engine.go.clear()
                break
        taken = engine.steps
        engine.go.set()
        await until(lambda: engine.cancelled)
        assert engine.steps <= taken + 2  # One may have been under way, and one begun.
        assert not engine.busy
        assert thread.running == thread.waiting == 0


@in_loop
async def test_cancelling_the_coroutine_cancels_the_request():
    engine = ScriptedEngine("word " * 400)
    engine.pause = 0.002

    async def ask(thread: EngineThread) -> None:
        async with thread.answering(request(max_new_tokens=1000, n=2)) as answers:
            await tokens(answers)

    async with started(engine) as thread:
        task = asyncio.create_task(ask(thread))
        await until(lambda: engine.steps > 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: engine.cancelled)
        assert engine.cancelled == [0]
        assert not engine.busy


class Late(ScriptedEngine):
    """Delivers an event of each request that it has dropped, as one in flight may come."""

    def cancel(self, number):
        self.late = [one for one in self._live if one.number == number]
        super().cancel(number)

    def step(self):
        super().step()
        for one in getattr(self, "late", ()):
            one.left = [EOS]
            one.on_event(self._event(one))


@in_loop
async def test_an_event_after_the_cancellation_reaches_nobody():
    engine = Late("word " * 100)
    async with started(engine) as thread, thread.answering(request(max_new_tokens=50)) as other:
        async with thread.answering(request()) as answers:
            async for _ in answers:
                break
        assert len(await tokens(other)) == 50
        assert len(engine.cancelled) == 1
        assert thread.failures == 0


@in_loop
async def test_a_step_that_fails_ends_the_requests_that_it_took_with_it():
    engine = ScriptedEngine(TEXT)
    async with started(engine) as thread:
        async with thread.answering(request()) as answers:
            engine.failure = RuntimeError("the device is gone: secret")
            with pytest.raises(ApiError, match="the engine failed; the server's log says why") as e:
                await tokens(answers)
        assert (e.value.status, thread.failures, thread.healthy) == (500, 1, True)
        async with thread.answering(request()) as answers:
            assert await tokens(answers) == TOKENS
        assert engine.cancelled == []


class OneFails(ScriptedEngine):
    """Loses the request with this number in its third step, and no other."""

    def step(self):
        super().step()
        if self.steps == 3:
            self._live = [one for one in self._live if one.number != 1]
            raise UnicodeDecodeError("utf-8", b"x", 0, 1, "a token's text could not be made")


@in_loop
async def test_a_failure_of_one_request_leaves_the_others_alone():
    engine = OneFails(TEXT)
    engine.go.clear()
    async with (
        started(engine) as thread,
        thread.answering(request()) as first,
        thread.answering(request()) as second,
    ):
        engine.go.set()
        assert await tokens(first) == TOKENS
        with pytest.raises(ApiError):
            await tokens(second)


@in_loop
async def test_a_thread_whose_every_step_fails_is_not_healthy():
    engine = ScriptedEngine(TEXT)
    async with started(engine) as thread:
        for healthy in (True, True, False):
            async with thread.answering(request()) as answers:
                engine.failure = RuntimeError("the device is gone")
                with pytest.raises(ApiError):
                    await tokens(answers)
            assert thread.healthy == healthy
        async with thread.answering(request()) as answers:
            await tokens(answers)
        assert thread.healthy


class Broken(ScriptedEngine):
    """Cannot be asked anything."""

    def cancel(self, number):
        raise RuntimeError("a defect")


@in_loop
async def test_a_defect_of_the_engine_ends_all_and_shows_in_health():
    engine = Broken("word " * 400)
    engine.pause = 0.002
    async with started(engine) as thread:
        async with thread.answering(request(max_new_tokens=1000)) as other:
            async with thread.answering(request()):
                await until(lambda: len(engine.requests) == 2)
            with pytest.raises(ApiError):
                await tokens(other)
        await until(lambda: not thread.healthy)
        with pytest.raises(ApiError) as refused:
            async with thread.answering(request()):
                pass
        assert refused.value.status == 503


@in_loop
async def test_what_the_engine_refuses_is_refused_before_it_is_submitted():
    engine = ScriptedEngine(TEXT)
    async with started(engine) as thread:
        with pytest.raises(MeshwenError, match="the prompt is empty"):
            async with thread.answering(Request((), SamplingParams())):
                pass
    assert engine.requests == []


class Picky(ScriptedEngine):
    """Refuses in `submit` what `check` lets pass, as where memory has become short."""

    def submit(self, request, on_event):
        raise self.failure


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MeshwenError("no room"), 400),
        (QueueFullError("8 wait"), 503),
        (RuntimeError("a defect"), 500),
    ],
)
@in_loop
async def test_what_submit_refuses_ends_that_request_alone(error, status):
    engine = Picky(TEXT)
    engine.failure = error
    async with started(engine) as thread:
        async with thread.answering(request()) as answers:
            with pytest.raises(ApiError) as found:
                await tokens(answers)
        assert found.value.status == status
        assert thread.healthy


@in_loop
async def test_the_queue_has_a_limit_beyond_what_runs_at_once():
    engine = ScriptedEngine(TEXT, slots=2)
    engine.go.clear()
    async with (
        started(engine, max_queue=1) as thread,
        thread.answering(request(n=2)) as first,
        thread.answering(request()),
    ):
        with pytest.raises(ApiError, match=r"as many requests wait as may \(1\)") as full:
            async with thread.answering(request()):
                pass
        assert (full.value.status, full.value.headers) == (503, {"Retry-After": "1"})
        engine.go.set()
        await tokens(first)
        async with thread.answering(request()) as answers:
            assert await tokens(answers) == TOKENS


@in_loop
async def test_without_a_queue_what_can_run_at_once_is_taken():
    engine = ScriptedEngine(TEXT, slots=2)
    async with (
        started(engine, max_queue=0) as thread,
        thread.answering(request(n=5)) as several,
    ):
        assert await tokens(several, 4) == TOKENS


@in_loop
async def test_waiting_and_running_requests_are_counted():
    engine = ScriptedEngine(TEXT, slots=1)
    engine.go.clear()
    async with started(engine) as thread:
        assert (thread.running, thread.waiting) == (0, 0)
        async with thread.answering(request()) as first, thread.answering(request()) as second:
            assert (thread.running, thread.waiting) == (0, 2)
            await until(lambda: engine.requests)
            engine.go.set()
            await tokens(first)
            await tokens(second)
            assert (thread.running, thread.waiting) == (0, 0)


@in_loop
async def test_closing_ends_what_runs_and_what_was_not_submitted_yet():
    engine = ScriptedEngine("word " * 400)
    engine.go.clear()
    thread = EngineThread(engine, 10, engine.slots)
    thread.start()
    async with thread.answering(request(max_new_tokens=1000)) as running:
        await until(lambda: engine.busy)
        async with thread.answering(request()) as asked:
            closing = asyncio.create_task(thread.close())
            await asyncio.sleep(0)
            engine.go.set()
            await closing
            for answers in (running, asked):
                with pytest.raises(ApiError, match="shutting down") as ended:
                    await tokens(answers)
                assert ended.value.status == 503
            with pytest.raises(ApiError, match="shutting down"):
                async with thread.answering(request()):
                    pass
    await thread.close()
    assert not thread.healthy


@in_loop
async def test_a_thread_that_was_not_started_is_closed():
    await EngineThread(ScriptedEngine(TEXT), 1).close()


@in_loop
async def test_the_meter_is_told_of_each_request_and_event_in_the_event_loop():
    seen, threads = [], set()

    class Telling(Meter):
        def __init__(self, request):
            self._note(request)

        def events(self, found):
            self._note(*(event.token for event in found))

        def end(self):
            self._note("end")

        def _note(self, *what):
            seen.extend(what)
            threads.add(threading.current_thread())

    one = request()
    async with (
        started(ScriptedEngine(TEXT), meter=Telling) as thread,
        thread.answering(one) as answers,
    ):
        await tokens(answers)
    assert seen == [one, *TOKENS, "end"]
    assert threads == {threading.main_thread()}


@in_loop
async def test_many_requests_that_come_and_go_leave_nothing_behind():
    engine = ScriptedEngine("word " * 20, slots=4)

    async def ask(thread: EngineThread, number: int) -> int:
        async with thread.answering(request(max_new_tokens=5)) as answers:
            if number % 3 == 0:
                return 0
            count = 0
            async for events in answers:
                count += len(events)
                if number % 3 == 1 and count == 2:
                    break
            return count

    async with started(engine, max_queue=1000) as thread:
        found = await asyncio.gather(*(ask(thread, number) for number in range(300)))
        await until(lambda: not engine.busy and not thread.running)
        assert found == [0, 2, 5] * 100
        assert not thread._submitted
        assert not thread._open
