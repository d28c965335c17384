# SPDX-License-Identifier: Apache-2.0
"""Streams of server-sent events: one answer's deltas as they come."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from meshwen.server.errors import ApiError
from meshwen.server.generation import Delta
from meshwen.server.replies import Envelope, to_json

logger = logging.getLogger(__name__)

CLIENT_GONE = 499
# For a route whose answer may be streamed: what the document of the interface says of it.
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or a stream of its parts",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


class StreamEvents(Protocol):
    """Writes one protocol's events."""

    @property
    def idle(self) -> str:
        """What is sent where nothing has come for some seconds."""

    def step(self, deltas: Sequence[Delta]) -> str:
        """The events of a step; "": none."""

    def end(self) -> str:
        """The events after the last step."""

    def error(self, error: ApiError) -> str:
        """The events where the answer breaks off, the stream's last."""


async def event_stream(
    steps: AsyncGenerator[list[Delta], None], events: StreamEvents
) -> StreamingResponse:
    """The response that streams a generation's steps.

    Args:
        steps: of `meshwen.server.generation.generate`.
        events: how they are written.

    Raises:
        ApiError: the request is refused: there is no stream.
    """
    await anext(steps)
    return _EventStream(steps, events)


class _EventStream(StreamingResponse):
    """A stream that ends its generation, however it ends: a client may go before the first byte."""

    def __init__(self, steps: AsyncGenerator[list[Delta], None], events: StreamEvents):
        self._steps = steps
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_text(steps, events), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._steps):
            await super().__call__(scope, receive, send)


async def _text(
    steps: AsyncGenerator[list[Delta], None], events: StreamEvents
) -> AsyncGenerator[str, None]:
    try:
        async for deltas in steps:
            if text := events.step(deltas) if deltas else events.idle:
                yield text
    except ApiError as error:
        if error.status != CLIENT_GONE:
            yield events.error(error)
    except Exception:
        logger.exception("a stream failed")
        yield events.error(ApiError(500, "the server failed; its log says why"))
    else:
        yield events.end()


def data_line(body: Any) -> str:
    """An event of one JSON value."""
    return f"data: {to_json(body)}\n\n"


class OpenAIEvents:
    """Chunks as OpenAI's streams have them: a subclass makes a delta's.

    Args:
        envelope: what all chunks have.
        include_usage: end with the number of tokens.
        continuous_usage: say the number of tokens so far in each chunk.
    """

    idle = ": nothing new\n\n"

    def __init__(self, envelope: Envelope, include_usage: bool, continuous_usage: bool):
        self.envelope = envelope
        self._include_usage, self._continuous = include_usage, continuous_usage

    def chunks(self, delta: Delta) -> Iterable[dict[str, Any]]:
        """The choices of the chunks that a delta makes, with further fields of the chunk."""
        raise NotImplementedError

    def step(self, deltas: Sequence[Delta]) -> str:
        """The events of a step."""
        lines = []
        for delta in deltas:
            self.envelope.usage.add([delta])
            lines += [data_line(self._with_usage(body)) for body in self.chunks(delta)]
        return "".join(lines)

    def _with_usage(self, body: dict[str, Any]) -> dict[str, Any]:
        if self._continuous:
            return body | {"usage": self.envelope.usage.body()}
        return body | {"usage": None} if self._include_usage else body

    def end(self) -> str:
        """The number of tokens, if it is asked for, and the end's mark."""
        usage = self.envelope.usage.body()
        last = data_line(self.envelope.body([], usage=usage)) if self._include_usage else ""
        return last + "data: [DONE]\n\n"

    def error(self, error: ApiError) -> str:
        """The error, and the end's mark."""
        return data_line(error.openai()) + "data: [DONE]\n\n"
