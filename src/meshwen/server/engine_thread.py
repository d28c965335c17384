# SPDX-License-Identifier: Apache-2.0
"""An engine in a thread of its own, for the coroutines of one event loop.

The thread alone calls the engine. Between two steps it takes what the event loop has asked for
since, in order; after a step it hands all of the step's events over at once. So no step blocks the
event loop, and no request waits for another's coroutine.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Protocol

from meshwen.engine.request import Event, Request
from meshwen.errors import MeshwenError
from meshwen.server.errors import ApiError

logger = logging.getLogger(__name__)


class Stepping(Protocol):
    """What the thread needs of an engine: see `meshwen.engine.engine.Engine`."""

    @property
    def busy(self) -> bool:
        """Whether there is something to compute."""

    def check(self, request: Request, name: str) -> None:
        """Refuses a request that cannot be answered."""

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
    """

    def __init__(self) -> None:
        self.begun = self.ended = False
        self._steps: asyncio.Queue[list[Event] | ApiError | None] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        """Yields the events of each step that has some, up to the last answer's last token.

        Raises:
            ApiError: the engine failed, or was closed.
        """
        while (found := await self._steps.get()) is not None:
            if isinstance(found, ApiError):
                raise found
            yield found

    def put(self, found: list[Event] | ApiError | None) -> None:
        """Adds the events of a step; an error or None is the last. For the event loop's thread."""
        self.begun |= isinstance(found, list)
        self.ended |= not isinstance(found, list)
        self._steps.put_nowait(found)


class EngineThread:
    """Runs an engine for the coroutines of the event loop that calls `start`.

    Args:
        engine: the engine, which nobody else may call from now on.
        max_queue: requests that may wait; further ones are refused.

    Attributes:
        failures: steps that broke off.
    """

    def __init__(self, engine: Stepping, max_queue: int):
        self._engine, self._max_queue = engine, max_queue
        self._open: set[Answers] = set()  # The event loop's: somebody waits for them.
        self._tasks: deque[Callable[[], None]] = deque()  # For the thread, in order.
        self._wake = threading.Condition()
        self._closing = False
        # What follows is the thread's.
        self._submitted: dict[Answers, tuple[int, int]] = {}  # Number, and unfinished choices.
        self._outbox: dict[Answers, list[Event]] = {}  # Events of this step.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failures = 0

    @property
    def waiting(self) -> int:
        """Requests that no token has come of yet."""
        return sum(not one.begun for one in self._open)

    @property
    def running(self) -> int:
        """Requests that a token has come of, and that are unfinished."""
        return sum(one.begun and not one.ended for one in self._open)

    def start(self) -> None:
        """Starts the thread; call it in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Ends the thread after its step; what is unfinished gets an error."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    @asynccontextmanager
    async def answering(self, request: Request) -> AsyncIterator[Answers]:
        """Submits a request; what is unfinished of it when the block ends is cancelled.

        Raises:
            MeshwenError: the engine cannot answer it.
            ApiError: too many requests wait, or the thread is closing: 503.
        """
        self._engine.check(request, "the prompt")
        if self._closing:
            raise ApiError(503, "the server is shutting down")
        if self.waiting >= self._max_queue:
            raise ApiError(
                503,
                f"{self._max_queue} requests wait already; try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        answers = Answers()
        self._open.add(answers)
        self._ask(partial(self._submit, request, answers))
        try:
            yield answers
        finally:
            self._open.discard(answers)
            if not answers.ended:
                self._ask(partial(self._cancel, answers))

    def _ask(self, task: Callable[[], None]) -> None:
        """Has the thread do something before its next step."""
        with self._wake:
            self._tasks.append(task)
            self._wake.notify()

    def _run(self) -> None:
        """The thread: what was asked for, then a step, again and again."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._tasks or self._closing or self._engine.busy)
                if self._closing:
                    break
            while self._tasks:
                self._tasks.popleft()()
            if self._engine.busy:
                self._step()
        self._end_all(ApiError(503, "the server is shutting down"))

    def _step(self) -> None:
        try:
            self._engine.step()
        except Exception:
            logger.exception("a step of the engine failed")
            self.failures += 1
            self._send_outbox()
            self._end_all(ApiError(500, "the engine failed; the server's log says why"))
        self._send_outbox()

    def _submit(self, request: Request, answers: Answers) -> None:
        def on_event(event: Event) -> None:
            self._outbox.setdefault(answers, []).append(event)
            if event.completion is not None:
                number, left = self._submitted[answers]
                self._submitted[answers] = number, left - 1

        try:
            number = self._engine.submit(request, on_event)
        except MeshwenError as error:
            self._send([(answers, ApiError(400, str(error)))])
        else:
            self._submitted[answers] = number, request.sampling.n

    def _cancel(self, answers: Answers) -> None:
        number, _ = self._submitted.pop(answers, (None, 0))
        if number is not None:
            self._engine.cancel(number)

    def _send_outbox(self) -> None:
        """Hands over the events of a step, in one call of the event loop."""
        sent: list[tuple[Answers, list[Event] | ApiError | None]] = []
        for answers, events in self._outbox.items():
            sent.append((answers, events))
            if answers in self._submitted and not self._submitted[answers][1]:
                del self._submitted[answers]
                sent.append((answers, None))
        self._outbox.clear()
        self._send(sent)

    def _end_all(self, error: ApiError) -> None:
        self._send([(answers, error) for answers in self._submitted])
        self._submitted.clear()

    def _send(self, found: list[tuple[Answers, list[Event] | ApiError | None]]) -> None:
        assert self._loop is not None
        if found:
            self._loop.call_soon_threadsafe(_put, found)


def _put(found: list[tuple[Answers, list[Event] | ApiError | None]]) -> None:
    for answers, one in found:
        answers.put(one)
