# SPDX-License-Identifier: Apache-2.0
"""The answers to one HTTP request, whatever its protocol: from the engine's events to deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import Request as HttpRequest

from meshwen.engine.request import Completion, Event, Request
from meshwen.errors import MeshwenError
from meshwen.server.engine_thread import Answers
from meshwen.server.errors import ApiError
from meshwen.server.serving import Serving

if TYPE_CHECKING:
    from meshwen.server.parsing import OutputParser, ToolCallDelta

# The events of a step, with the number of their request; an error; or the end of a request.
_Found = tuple[int, list[Event]] | Exception | None


@dataclass(frozen=True)
class Generation:
    """What one HTTP request asks of the engine.

    Attributes:
        requests: the engine's, several where there are several prompts.
        parser: makes the parser of one answer: text to content, reasoning and tool calls.
    """

    requests: tuple[Request, ...]
    parser: Callable[[], OutputParser]


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
    """

    index: int
    content: str
    reasoning: str
    tool_calls: tuple[ToolCallDelta, ...]
    event: Event
    finish_reason: str | None
    completion: Completion | None


async def generate(
    serving: Serving, generation: Generation, http_request: HttpRequest
) -> AsyncGenerator[list[Delta], None]:
    """Yields what each step of the engine adds; first, once nothing is to be refused, nothing.

    So who streams asks for the first list before the response begins. Closing the iterator, a
    client that goes away, and an error cancel what is unfinished.

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
    async with AsyncExitStack() as stack:
        try:
            answers = [await stack.enter_async_context(engine.answering(one)) for one in requests]
        except MeshwenError as error:
            raise ApiError(400, str(error)) from None
        yield []
        steps = _steps(answers, http_request, _timeout(serving))
        async with aclosing(steps):
            async for number, events in steps:
                yield [_delta(starts[number] + one.choice, one, parsers) for one in events]


def _timeout(serving: Serving) -> float | None:
    """The most seconds that a request may take; None: any."""
    return getattr(serving.options, "request_timeout", None) or None


def _delta(index: int, event: Event, parsers: Sequence[OutputParser]) -> Delta:
    parser = parsers[index]
    done = event.completion
    if done is not None and done.error is not None:
        raise ApiError(500, done.error)
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
    answers: Sequence[Answers], http_request: HttpRequest, seconds: float | None
) -> AsyncGenerator[tuple[int, list[Event]], None]:
    """Yields the events of each step, with the number of the request that they belong to.

    Whatever may come, events, errors, the client's end, the time limit, comes by one queue.
    """
    found: asyncio.Queue[_Found] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(i, one, found)) for i, one in enumerate(answers)]
    tasks.append(asyncio.create_task(_watch(http_request, found)))
    late = ApiError(504, f"the answer took longer than {seconds} s", code="timeout")
    loop = asyncio.get_running_loop()
    timer = None if seconds is None else loop.call_later(seconds, found.put_nowait, late)
    try:
        left = len(answers)
        while left:
            one = await found.get()
            if isinstance(one, Exception):
                raise one
            if one is None:
                left -= 1
            else:
                yield one
    finally:
        for task in tasks:
            task.cancel()
        if timer is not None:
            timer.cancel()


async def _pump(number: int, answers: Answers, found: asyncio.Queue[_Found]) -> None:
    """Puts the events of one request into the queue, and None or an error after them."""
    try:
        async for events in answers:
            found.put_nowait((number, events))
    except Exception as error:
        found.put_nowait(error)
    else:
        found.put_nowait(None)


async def _watch(http_request: HttpRequest, found: asyncio.Queue[_Found]) -> None:
    """Puts an error into the queue when the client goes away."""
    while (await http_request.receive())["type"] != "http.disconnect":
        pass
    found.put_nowait(ApiError(499, "the client has gone"))
