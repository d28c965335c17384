# SPDX-License-Identifier: Apache-2.0
"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's interface."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from meshwen.engine.request import Request
from meshwen.server.blocks import Block, Blocks
from meshwen.server.chat import generation_of, prompt_of
from meshwen.server.errors import ApiError
from meshwen.server.fields import check_model
from meshwen.server.generation import Delta, generate
from meshwen.server.messages_models import CountRequest, MessagesRequest
from meshwen.server.parsers import thinking_switch
from meshwen.server.parsing import new_id
from meshwen.server.replies import json_response, to_json
from meshwen.server.serving import Serving
from meshwen.server.sse import STREAMED, event_stream
from meshwen.server.tagged import as_chat, naming

router = APIRouter()

# Thoughts of this model need no proof of where they come from, but clients look for one.
_SIGNATURE = "unsigned"


@router.post("/v1/messages", responses=STREAMED)
async def create_message(body: MessagesRequest, http_request: HttpRequest) -> Response:
    """Continues a conversation."""
    serving = _serving(body, http_request)
    with naming({"response_format": "output_config.format"}):
        generation = await generation_of(serving, as_chat(body.for_chat()))
    (request,) = generation.requests
    steps = generate(serving, generation, http_request)
    message = _Message(serving, request)
    if body.stream:
        return await event_stream(steps, _MessageEvents(message))
    async with aclosing(steps):
        async for deltas in steps:
            for _ in message.add(deltas):
                pass
    return json_response(message.body())


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, http_request: HttpRequest) -> Response:
    """Says how many tokens a prompt has; it may have more than the model takes."""
    serving = _serving(body, http_request)
    prompt = await prompt_of(serving, as_chat(body.for_chat()), limited=False)
    return json_response({"input_tokens": len(prompt)})


def _serving(body: CountRequest, http_request: HttpRequest) -> Serving:
    """The model that is asked."""
    serving: Serving = http_request.app.state.serving
    check_model(serving, body.model)
    if body.thread is not None:
        raise ApiError(
            400,
            "thread is not supported: nothing is stored here; send the whole conversation",
            param="thread",
            code="thread_unsupported_request",
        )
    if body.thinking is not None:
        thinks = body.thinking.type != "disabled"
        if thinks not in thinking_switch(serving):
            always = "thinks before every answer" if not thinks else "does not think"
            raise ApiError(400, f"thinking: this model {always}; leave it out", param="thinking")
    return serving


class _Message:
    """An answer as it comes.

    Args:
        serving: the model.
        request: the engine's.
    """

    def __init__(self, serving: Serving, request: Request):
        self._serving, self._request = serving, request
        self._id = new_id("msg_")
        self._blocks = Blocks()
        self._tokens = 0
        self._last: Delta | None = None

    def begin(self) -> Iterator[dict[str, Any]]:
        """The events before the first token."""
        yield {"type": "message_start", "message": self.body()}
        yield {"type": "ping"}

    def add(self, deltas: Iterable[Delta]) -> Iterator[dict[str, Any]]:
        """The events of a step."""
        for delta in deltas:
            self._tokens += 1
            self._last = delta
            for change, block, piece in self._blocks.add(delta):
                yield from _CHANGES[change](block, piece)

    def end(self) -> Iterator[dict[str, Any]]:
        """The events after the last token."""
        for _, block, piece in self._blocks.end():
            yield from _ends(block, piece)
        yield {"type": "message_delta", "delta": self._stop(), "usage": self._usage()}
        yield {"type": "message_stop"}

    def body(self) -> dict[str, Any]:
        """The message as far as it has come."""
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._serving.names[0],
            "content": [_content(block) for block in self._blocks.all],
            **self._stop(),
            "usage": self._usage(),
        }

    def _stop(self) -> dict[str, Any]:
        done = None if self._last is None else self._last.completion
        if self._last is None or done is None:
            return {"stop_reason": None, "stop_sequence": None}
        reason = {"tool_calls": "tool_use", "length": "max_tokens"}.get(
            str(self._last.finish_reason), "end_turn"
        )
        length = len(done.prompt_tokens) + len(done.tokens)
        if reason == "max_tokens" and length >= self._serving.max_model_len:
            reason = "model_context_window_exceeded"
        sequence = done.stop_reason if isinstance(done.stop_reason, str) else None
        if reason == "end_turn" and sequence is not None:
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _usage(self) -> dict[str, Any]:
        done = None if self._last is None else self._last.completion
        cached = 0
        if self._serving.options.enable_prompt_tokens_details and done is not None:
            cached = done.cached_tokens
        return {
            "input_tokens": len(self._request.prompt_tokens) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self._tokens,
        }


def _content(block: Block) -> dict[str, Any]:
    """A block as far as it has come."""
    if block.kind == "content":
        return {"type": "text", "text": block.text, "citations": None}
    if block.kind == "reasoning":
        signature = _SIGNATURE if block.text else ""
        return {"type": "thinking", "thinking": block.text, "signature": signature}
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": block.arguments}


def _begins(block: Block, _: str) -> Iterator[dict[str, Any]]:
    yield {
        "type": "content_block_start",
        "index": block.number,
        "content_block": _content(block),
    }


def _grows(block: Block, piece: str) -> Iterator[dict[str, Any]]:
    kind, name = {
        "content": ("text_delta", "text"),
        "reasoning": ("thinking_delta", "thinking"),
        "call": ("input_json_delta", "partial_json"),
    }[block.kind]
    yield _delta(block, {"type": kind, name: piece})


def _ends(block: Block, _: str) -> Iterator[dict[str, Any]]:
    if block.kind == "reasoning":
        yield _delta(block, {"type": "signature_delta", "signature": _SIGNATURE})
    yield {"type": "content_block_stop", "index": block.number}


def _delta(block: Block, delta: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": block.number, "delta": delta}


_CHANGES = {"begins": _begins, "grows": _grows, "ends": _ends}


class _MessageEvents:
    """The events of a message's stream."""

    def __init__(self, message: _Message):
        self._message = message
        self._begun = False

    @property
    def idle(self) -> str:
        """What is sent where nothing has come for some seconds."""
        return self._first() or 'event: ping\ndata: {"type":"ping"}\n\n'

    def step(self, deltas: Sequence[Delta]) -> str:
        """The events of a step."""
        return self._first() + _written(self._message.add(deltas))

    def end(self) -> str:
        """The events after the last step."""
        return self._first() + _written(self._message.end())

    def error(self, error: ApiError) -> str:
        """The error."""
        return _written([error.anthropic()])

    def _first(self) -> str:
        begun, self._begun = self._begun, True
        return "" if begun else _written(self._message.begin())


def _written(events: Iterable[dict[str, Any]]) -> str:
    return "".join(f"event: {one['type']}\ndata: {to_json(one)}\n\n" for one in events)
