# SPDX-License-Identifier: Apache-2.0
"""An answer of a chat as a server streams it, which whoever waits for it can stop at any time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NotRequired

from typing_extensions import TypedDict

from meshwen.client.server import Body, Server
from meshwen.common.json_files import Count, check_shape, parse_json, to_json
from meshwen.errors import MeshwenError

_TICK = 0.05  # seconds until a signal's handler is heard
_LONGEST_EVENT_BYTES = 16 << 20


@dataclass(frozen=True)
class Piece:
    """What one event adds to an answer.

    Attributes:
        text: more of it; thoughts and tool calls are written as Qwen's models write them.
        finish_reason: why it ended, with its last piece.
        usage: tokens of prompt and answer, where the event tells them.
    """

    text: str
    finish_reason: str | None
    usage: Mapping[str, Any] | None


class _Function(TypedDict):
    name: NotRequired[str | None]
    arguments: NotRequired[str | None]


class _Call(TypedDict):
    function: NotRequired[_Function | None]


class _Delta(TypedDict):
    content: NotRequired[str | None]
    reasoning_content: NotRequired[str | None]
    reasoning: NotRequired[str | None]
    tool_calls: NotRequired[list[_Call] | None]


class _Choice(TypedDict):
    delta: NotRequired[_Delta | None]
    finish_reason: NotRequired[str | None]


class _Usage(TypedDict):
    prompt_tokens: NotRequired[Count]
    completion_tokens: NotRequired[Count]


class _Problem(TypedDict):
    message: NotRequired[str]


class _Chunk(TypedDict):
    choices: NotRequired[list[_Choice]]
    usage: NotRequired[_Usage | None]
    error: NotRequired[_Problem | None]


class ChatStream:
    """The answer to one request, by a thread that reads what the server sends.

    So a signal's handler can end the wait for a server that is silent.

    Args:
        server: the server.
        body: the request to its chat completions.
    """

    def __init__(self, server: Server, body: Mapping[str, Any]):
        self._server, self._closed = server, False
        self._response: Body | None = None
        self._body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        self._found: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="chat stream", daemon=True).start()

    def close(self) -> None:
        """Ends the answer, and its iterator; a signal's handler may call it."""
        self._closed = True
        if (response := self._response) is not None:
            response.hang_up()

    def __iter__(self) -> Iterator[Piece]:
        """Yields the pieces, once.

        Raises:
            MeshwenError: the request is refused, or the answer breaks off.
        """
        while not self._closed:
            try:
                found = self._found.get(timeout=_TICK)
            except queue.Empty:
                continue
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            yield found

    def _read(self) -> None:
        try:
            with self._server.stream("/chat/completions", self._body) as response:
                self._response = response
                if self._closed:  # While the server was busy.
                    return
                writer = _Writer()
                for event in events(response):
                    if self._closed:
                        return
                    self._found.put(writer.piece(self._chunk(event)))
            self._found.put(None)
        except BaseException as error:
            self._found.put(error)

    def _chunk(self, event: str) -> _Chunk:
        where = f"an event of {self._server.url}"
        chunk = check_shape(parse_json(event, where), _Chunk, where)
        if problem := chunk.get("error"):
            raise MeshwenError(f"{self._server.url}: {problem.get('message', 'the answer failed')}")
        return chunk


class _Writer:
    """Writes thoughts and tool calls into the text: `<think>`, `<tool_call>`."""

    def __init__(self) -> None:
        self._thinks = False
        self._calls: list[tuple[str, str]] = []  # Names and arguments.

    def piece(self, chunk: _Chunk) -> Piece:
        """What an event adds."""
        usage = chunk.get("usage")
        choices = chunk.get("choices") or []
        if not choices:
            return Piece("", None, usage)
        delta, reason = choices[0].get("delta") or {}, choices[0].get("finish_reason")
        text = self._thought(delta.get("reasoning_content") or delta.get("reasoning") or "")
        said = delta.get("content") or ""
        self._note_calls(delta.get("tool_calls") or [])
        if self._thinks and (said or self._calls or reason):
            self._thinks = False
            text += "\n</think>\n\n"
        text += said + (self._called() if reason else "")
        return Piece(text, reason, usage)

    def _thought(self, text: str) -> str:
        if not text or self._thinks:
            return text
        self._thinks = True
        return f"<think>\n{text}"

    def _note_calls(self, calls: list[_Call]) -> None:
        for call in calls:
            function = call.get("function") or {}
            name, arguments = function.get("name") or "", function.get("arguments") or ""
            if name:  # The first piece of a call has it.
                self._calls.append((name, arguments))
            elif self._calls:
                before, so_far = self._calls[-1]
                self._calls[-1] = before, so_far + arguments

    def _called(self) -> str:
        """The calls of the whole answer."""
        return "".join(
            f'\n<tool_call>\n{{"name": {to_json(name)}, "arguments": {arguments or "{}"}}}\n'
            "</tool_call>"
            for name, arguments in self._calls
        )


def events(data: Iterable[bytes]) -> Iterator[str]:
    """The data of each server-sent event, up to `[DONE]`; comments are passed over.

    Raises:
        MeshwenError: it ends without `[DONE]`, an event is too long, or is no UTF-8.
    """
    for lines in _event_lines(data):
        found = [line.removeprefix(b"data:").removeprefix(b" ") for line in lines]
        if found == [b"[DONE]"]:
            return
        try:
            yield b"\n".join(found).decode()
        except UnicodeDecodeError:
            raise MeshwenError("the server sent an event that is not UTF-8") from None
    raise MeshwenError("the server broke off before the answer was whole")


def _event_lines(data: Iterable[bytes]) -> Iterator[list[bytes]]:
    """The data lines of each event that has some."""
    rest, lines = b"", []
    for piece in data:
        *whole, rest = (rest + piece).split(b"\n")
        if len(rest) > _LONGEST_EVENT_BYTES:
            raise MeshwenError(f"the server sent more than {_LONGEST_EVENT_BYTES >> 20} MiB a line")
        for line in whole:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                lines.append(line)
            elif not line and lines:
                yield lines
                lines = []
    if lines:
        yield lines
