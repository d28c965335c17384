# SPDX-License-Identifier: Apache-2.0
"""An engine in a thread of its own, for the coroutines of one event loop.

The thread alone computes. Between two steps it takes what the event loop has asked for since, in
order; after a step it hands all of the step's events over at once. So no step blocks the event
loop, and no request waits for another's coroutine.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Protocol

from meshwen.engine.engine import QueueFullError
from meshwen.engine.request import Event, Request
from meshwen.errors import MeshwenError
from meshwen.server.errors import ApiError

logger = logging.getLogger(__name__)

_UNHEALTHY = 3  # Steps that failed one after the other.
_MOST_COMPILING = 2  # Grammars at the same time: there are steps to compute, too.

_Found = list[Event] | ApiError | None


class Meter:
    """Is told what becomes of one request, in the event loop; this one does nothing with it."""

    def events(self, found: list[Event]) -> None:
        """The events of a step came."""

    def end(self) -> None:
        """Nobody waits any more: all has come, or what is missing will not."""


class Stepping(Protocol):
    """What the thread needs of an engine: see `meshwen.engine.engine.Engine`."""

    @property
    def busy(self) -> bool:
        """Whether there is something to compute."""

    @property
    def waiting(self) -> int:
        """Requests whose computation has not begun; any thread may ask."""

    def unfinished(self, number: int) -> bool:
        """Whether a request waits or runs."""

    def check(self, request: Request, name: str) -> None:
        """Refuses a request that cannot be answered; any thread may call it, at any time."""

    def check_grammar(self, grammar: str) -> None:
        """Refuses a grammar that no answer can be held to; any thread may call it, at any time."""

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> int:
        """Takes a request."""

    def cancel(self, number: int) -> None:
        """Drops a request."""

    def step(self) -> None:
        """Computes the next token of each answer."""


class Answers:
    """The answers to one request, as they come; iterate over them once.

    Attributes:
        begun: a token has come.
        ended: the last one has, or an error.
        dropped: nobody waits for them any more.
        request: what was asked.
        meter: what is told of it.
    """

    def __init__(self, request: Request, meter: Meter) -> None:
        self.request = request
        self.begun = self.ended = self.dropped = False
        self.meter = meter
        self._steps: asyncio.Queue[_Found] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        """Yields the events of each step that has some, up to the last answer's last token.

        Raises:
            ApiError: the engine failed, or was closed.
        """
        while (found := await self._steps.get()) is not None:
            if isinstance(found, ApiError):
                raise found
            yield found

    def put(self, found: _Found) -> None:
        """Adds the events of a step; an error or None is the last. For the event loop's thread."""
        if self.dropped:
            return
        if isinstance(found, list):
            self.begun = True
            self.meter.events(found)
        else:
            self.ended = True
        self._steps.put_nowait(found)


class EngineThread:
    """Runs an engine for the coroutines of the event loop that calls `start`.

    Args:
        engine: the engine, of which nobody else may call more than its checks from now on.
        max_queue: answers that may wait beyond `slots`; requests for more are refused.
        slots: answers that are computed at the same time.
        meter: gives each request, when it is asked for, what is told of it.

    Attributes:
        failures: steps that broke off.
    """

    def __init__(
        self,
        engine: Stepping,
        max_queue: int,
        slots: int = 1,
        meter: Callable[[Request], Meter] = lambda request: Meter(),
    ):
        self._engine, self._room, self._meter = engine, max_queue + slots, meter
        self._max_queue = max_queue
        self._open: set[Answers] = set()  # The event loop's: somebody waits for them.
        self._asked = 0  # Requests.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = asyncio.Event()
        self._compiling = asyncio.Semaphore(_MOST_COMPILING)
        # What both share. A task is a request to submit, or None to cancel what was submitted.
        self._wake = threading.Condition()
        self._tasks: deque[tuple[Answers, Request | None]] = deque()
        self._closing = False
        # What follows is the thread's; the event loop reads the numbers.
        self._taken = self._failed_in_a_row = self.failures = 0
        self._submitted: dict[Answers, tuple[int, int]] = {}  # Number, and unfinished choices.
        self._outbox: dict[Answers, list[Event]] = {}  # Events of this step.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def waiting(self) -> int:
        """Requests whose computation has not begun."""
        return min(self._unfinished, self._asked - self._taken + self._engine.waiting)

    @property
    def running(self) -> int:
        """Requests that are being computed."""
        return self._unfinished - self.waiting

    @property
    def _unfinished(self) -> int:
        return sum(not one.ended for one in self._open)

    @property
    def room(self) -> int:
        """Answers that may be unfinished."""
        return self._room

    @property
    def healthy(self) -> bool:
        """Whether the thread runs, and not every one of the last steps has failed."""
        alive = self._thread.is_alive() and not self._closing
        return alive and self._failed_in_a_row < _UNHEALTHY

    def start(self) -> None:
        """Starts the thread; call it in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Ends the thread after its step; what is unfinished gets an error."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._loop is not None:
            await self._ended.wait()

    async def check_grammar(self, grammar: str) -> None:
        """Refuses a grammar that no answer can be held to; it is compiled in another thread.

        Raises:
            MeshwenError: see `Engine.check_grammar`.
        """
        async with self._compiling:
            await asyncio.to_thread(self._engine.check_grammar, grammar)

    @asynccontextmanager
    async def answering(self, request: Request) -> AsyncIterator[Answers]:
        """Submits a request; what is unfinished of it when the block ends is cancelled.

        Raises:
            MeshwenError: the engine cannot answer it.
            ApiError: too many requests wait, or the thread is closing: 503.
        """
        if request.sampling.grammar is not None:
            await self.check_grammar(request.sampling.grammar)  # `check` finds it compiled.
        self._engine.check(request, "the prompt")
        self._check_room(request.sampling.n)
        answers = Answers(request, self._meter(request))
        self._ask(answers, request)
        self._open.add(answers)
        self._asked += 1
        try:
            yield answers
        finally:
            self._open.discard(answers)
            answers.dropped = True
            answers.meter.end()
            if not answers.ended:
                with suppress(ApiError):
                    self._ask(answers, None)

    def _check_room(self, choices: int) -> None:
        """Refuses more answers than may wait; one request may have any number of them."""
        unfinished = sum(one.request.sampling.n for one in self._open if not one.ended)
        if unfinished and unfinished + choices > self._room:
            raise _queue_full(self._max_queue)

    def _ask(self, answers: Answers, request: Request | None) -> None:
        """Has the thread submit a request, or cancel it, before its next step."""
        with self._wake:
            if self._closing:
                raise _shutting_down()
            self._tasks.append((answers, request))
            self._wake.notify()

    def _run(self) -> None:
        """The thread: what was asked for, then a step, again and again."""
        try:
            while self._has_work():
                self._take_tasks()
                if self._engine.busy:
                    self._step()
        except BaseException:
            logger.exception("the engine's thread failed")
            self.failures += 1
        with self._wake:
            self._closing = True  # From now on nothing is added to the tasks.
        left = [*self._submitted, *(one for one, request in self._tasks if request is not None)]
        self._send([(answers, _shutting_down()) for answers in left])
        self._call_loop(self._ended.set)

    def _has_work(self) -> bool:
        """Waits until there is something to do; False: the thread is to end."""
        with self._wake:
            self._wake.wait_for(lambda: self._tasks or self._closing or self._engine.busy)
            return not self._closing

    def _take_tasks(self) -> None:
        while self._tasks:
            answers, request = self._tasks.popleft()
            if request is None:
                self._cancel(answers)
            else:
                self._submit(request, answers)
                self._taken += 1

    def _submit(self, request: Request, answers: Answers) -> None:
        if answers.dropped:
            return

        def on_event(event: Event) -> None:
            if answers not in self._submitted:  # It was cancelled.
                return
            self._outbox.setdefault(answers, []).append(event)
            if event.completion is not None:
                number, left = self._submitted[answers]
                self._submitted[answers] = number, left - 1

        try:
            number = self._engine.submit(request, on_event)
        except QueueFullError:
            self._send([(answers, _queue_full(self._max_queue))])
        except MeshwenError as error:
            self._send([(answers, ApiError(400, str(error)))])
        except Exception:
            logger.exception("a request could not be submitted")
            self._send([(answers, _failed())])
        else:
            self._submitted[answers] = number, request.sampling.n

    def _cancel(self, answers: Answers) -> None:
        number, _ = self._submitted.pop(answers, (None, 0))
        self._outbox.pop(answers, None)
        if number is not None:
            self._engine.cancel(number)

    def _step(self) -> None:
        try:
            self._engine.step()
        except Exception:
            logger.exception("a step of the engine failed")
            self.failures += 1
            self._failed_in_a_row += 1
            self._send_outbox()
            self._end_lost()
        else:
            self._failed_in_a_row = 0
            self._send_outbox()

    def _send_outbox(self) -> None:
        """Hands over the events of a step, in one call of the event loop."""
        sent: list[tuple[Answers, _Found]] = []
        for answers, events in self._outbox.items():
            sent.append((answers, events))
            if not self._submitted[answers][1]:
                del self._submitted[answers]
                sent.append((answers, None))
        self._outbox.clear()
        self._send(sent)

    def _end_lost(self) -> None:
        """Ends the requests that a failed step has taken with it: one, or all that ran."""
        unfinished = self._engine.unfinished
        lost = [one for one, (number, _) in self._submitted.items() if not unfinished(number)]
        for answers in lost:
            del self._submitted[answers]
        self._send([(answers, _failed()) for answers in lost])

    def _send(self, found: list[tuple[Answers, _Found]]) -> None:
        if found:
            self._call_loop(partial(_put, found))

    def _call_loop(self, function: Callable[[], object]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # The loop is closed: nobody waits any more.
            self._loop.call_soon_threadsafe(function)


def _put(found: list[tuple[Answers, _Found]]) -> None:
    for answers, one in found:
        answers.put(one)


def _failed() -> ApiError:
    return ApiError(500, "the engine failed; the server's log says why")


def _queue_full(most: int) -> ApiError:
    return ApiError(
        503,
        f"as many requests wait as may ({most}); try again later",
        code="queue_full",
        headers={"Retry-After": "1"},
    )


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", headers={"Retry-After": "5"})
