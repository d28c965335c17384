# SPDX-License-Identifier: Apache-2.0
"""The answers to one HTTP request, whatever its protocol: from the engine's events to deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

from starlette.requests import Request as HttpRequest

from meshwen.engine.request import Completion, Event, Request
from meshwen.errors import MeshwenError
from meshwen.server.engine_thread import Answers
from meshwen.server.errors import ApiError
from meshwen.server.options import ServerOptions
from meshwen.server.parsing import OutputParser, PlainText, ToolCallDelta
from meshwen.server.serving import Serving

# The events of a step, with the number of their request; an error; or the end of a request.
_Found = tuple[int, list[Event]] | Exception | None


@dataclass(frozen=True)
class Generation:
    """What one HTTP request asks of the engine.

    Attributes:
        requests: the engine's, several where there are several prompts.
        parser: makes the parser of one answer: text to content, reasoning and tool calls.
        scoring: no answer is asked for: the one token that the engine gives is dropped.
    """

    requests: tuple[Request, ...]
    parser: Callable[[], OutputParser] = PlainText
    scoring: bool = False


@dataclass(frozen=True)
class Delta:
    """What one event of the engine adds to an answer.

    Attributes:
        index: of the answer: those of the first prompt come first.
        content: text to show.
        reasoning: text that the model thought, apart from what it answers.
        tool_calls: pieces of calls.
        event: the token, with its log-probabilities.
        finish_reason: with the last token: "stop", "length" or "tool_calls".
        completion: with the last token, the whole answer.
        dropped: the token is no part of the answer.
    """

    index: int
    content: str
    reasoning: str
    tool_calls: tuple[ToolCallDelta, ...]
    event: Event
    finish_reason: str | None
    completion: Completion | None
    dropped: bool = False


async def generate(
    serving: Serving, generation: Generation, http_request: HttpRequest
) -> AsyncGenerator[list[Delta], None]:
    """Yields what each step of the engine adds; an empty list where nothing came for some seconds.

    The first list is empty, and comes when nothing is to be refused any more: who streams waits
    for it before the response begins. Closing the iterator, a client that goes away, and an error
    cancel what is unfinished.

    Args:
        serving: the model.
        generation: what is asked of it.
        http_request: whose client is listened to.

    Raises:
        ApiError: before the first list: the engine cannot answer (400), or not now (503). Later:
            it failed (500), took too long (504), or the client has gone (499).
    """
    engine, requests = serving.engine, generation.requests
    starts = [sum(one.sampling.n for one in requests[:i]) for i in range(len(requests))]
    parsers = [generation.parser() for one in requests for _ in range(one.sampling.n)]
    if len(requests) > 1 and len(parsers) > engine.room:  # There would never be room for them.
        raise ApiError(
            400, f"the prompts ask for {len(parsers)} answers, and {engine.room} may wait"
        )
    async with AsyncExitStack() as stack:
        try:
            answers = [await stack.enter_async_context(engine.answering(one)) for one in requests]
        except MeshwenError as error:
            raise ApiError(400, str(error)) from None
        yield []
        steps = _steps(answers, http_request, serving.options)
        async with aclosing(steps):
            async for number, events in steps:
                indices = [starts[number] + event.choice for event in events]
                yield [
                    _delta(index, event, parsers[index], generation.scoring)
                    for index, event in zip(indices, events, strict=True)
                ]


def _delta(index: int, event: Event, parser: OutputParser, scoring: bool) -> Delta:
    done = event.completion
    if done is not None and done.error is not None:
        raise ApiError(400 if done.asked_too_much else 500, done.error)
    if scoring:
        return Delta(index, "", "", (), event, "length" if done else None, done, dropped=True)
    parsed = [parser.push(event.text)]
    reason: str | None = None
    if done is not None:
        parsed.append(parser.finish())
        called = done.finish_reason == "stop" and parser.called_tools
        reason = "tool_calls" if called else done.finish_reason
    return Delta(
        index,
        "".join(one.content for one in parsed),
        "".join(one.reasoning for one in parsed),
        tuple(call for one in parsed for call in one.tool_calls),
        event,
        reason,
        done,
    )


async def _steps(
    answers: Sequence[Answers], http_request: HttpRequest, options: ServerOptions
) -> AsyncGenerator[tuple[int, list[Event]], None]:
    """Yields the events of each step, with the number of the request that they belong to.

    Whatever may come, events, errors, the client's end, the time limit, comes by one inbox.
    """
    inbox = _Inbox(options.stream_keep_alive)
    tasks = [asyncio.create_task(_pump(i, one, inbox)) for i, one in enumerate(answers)]
    tasks.append(asyncio.create_task(_watch(http_request, inbox)))
    if seconds := options.request_timeout:
        inbox.put_later(seconds, ApiError(504, f"the answer took longer than {seconds:g} s"))
    try:
        left = len(answers)
        while left:
            one = await inbox.get()
            if isinstance(one, Exception):
                raise one
            if one is None:
                left -= 1
            else:
                yield one
    finally:
        inbox.close()
        for task in tasks:
            task.cancel()


class _Inbox:
    """What comes for one HTTP request, from several tasks.

    Args:
        idle_seconds: where nothing comes for so long, a step without events does; 0: never.
    """

    def __init__(self, idle_seconds: float):
        self._queue: asyncio.Queue[_Found] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._idle_seconds, self._idle = idle_seconds, False
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._look()

    def put(self, found: _Found) -> None:
        """Adds something."""
        self._idle = False
        self._queue.put_nowait(found)

    def put_later(self, seconds: float, error: Exception) -> None:
        """Adds an error after some time."""
        self._timers["late"] = self._loop.call_later(seconds, self.put, error)

    async def get(self) -> _Found:
        """Waits for what comes next."""
        return await self._queue.get()

    def close(self) -> None:
        """Lets nothing come any more by itself."""
        for timer in self._timers.values():
            timer.cancel()

    def _look(self) -> None:
        """Looks, once in so many seconds, whether something came since the last time."""
        if self._idle:
            self._queue.put_nowait((0, []))
        self._idle = True
        if self._idle_seconds:
            self._timers["idle"] = self._loop.call_later(self._idle_seconds, self._look)


async def _pump(number: int, answers: Answers, inbox: _Inbox) -> None:
    """Puts in the events of one request, and None or an error after them."""
    try:
        async for events in answers:
            inbox.put((number, events))
    except Exception as error:
        inbox.put(error)
    else:
        inbox.put(None)


async def _watch(http_request: HttpRequest, inbox: _Inbox) -> None:
    """Puts in an error when the client goes away."""
    while (await http_request.receive())["type"] != "http.disconnect":
        pass
    inbox.put(ApiError(499, "the client has gone"))
