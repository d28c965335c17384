# SPDX-License-Identifier: Apache-2.0
"""`/v1/responses`: OpenAI's responses. Nothing is stored: a request has the whole conversation."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from meshwen.engine.request import Request
from meshwen.server.blocks import Block, Blocks
from meshwen.server.chat import generation_of
from meshwen.server.errors import ApiError
from meshwen.server.fields import check_model
from meshwen.server.generation import Delta, generate
from meshwen.server.parsing import new_id
from meshwen.server.replies import json_response, to_json
from meshwen.server.responses_models import ResponsesRequest
from meshwen.server.serving import Serving
from meshwen.server.sse import STREAMED, event_stream
from meshwen.server.tagged import as_chat, naming
from meshwen.server.token_texts import TokenTexts

router = APIRouter()

Event = dict[str, Any]


@router.post("/v1/responses", responses=STREAMED)
async def create_response(body: ResponsesRequest, http_request: HttpRequest) -> Response:
    """Continues a conversation."""
    serving: Serving = http_request.app.state.serving
    check_model(serving, body.model)
    with naming({"response_format": "text.format", "messages": "input"}):
        generation = await generation_of(serving, as_chat(body.for_chat()))
    steps = generate(serving, generation, http_request)
    response = _Response(serving, body, generation.requests[0])
    if body.stream:
        return await event_stream(steps, _ResponseEvents(response))
    async with aclosing(steps):
        async for deltas in steps:
            for _ in response.add(deltas):
                pass
    for _ in response.end():
        pass
    return json_response(response.body())


class _Response:
    """An answer as it comes.

    Args:
        serving: the model.
        body: what is asked of it.
        request: the engine's.
    """

    def __init__(self, serving: Serving, body: ResponsesRequest, request: Request):
        self._serving, self._body, self._request = serving, body, request
        self._texts = TokenTexts(serving.tokenizer)
        self._id, self._created = new_id("resp_"), int(time.time())
        self._blocks = Blocks()
        self._items: list[Event] = []
        self._status = "in_progress"
        self._logprobs: list[Event] = []  # Of tokens since the last text, whose own it may be.
        self._tokens = self._reasoning_tokens = 0
        self._last: Delta | None = None

    def begin(self) -> Iterator[Event]:
        """The events before the first token."""
        yield {"type": "response.created", "response": self.body()}
        yield {"type": "response.in_progress", "response": self.body()}

    def add(self, deltas: Iterable[Delta]) -> Iterator[Event]:
        """The events of a step."""
        for delta in deltas:
            self._tokens += 1
            self._last = delta
            if delta.reasoning:
                self._reasoning_tokens = self._tokens
            self._logprobs += self._logprobs_of(delta)
            for change, block, piece in self._blocks.add(delta):
                if change == "begins":
                    yield from self._begins(block)
                elif change == "grows":
                    yield from self._grows(block, piece)
                else:
                    yield from self._ends(block, "completed")

    def end(self) -> Iterator[Event]:
        """The events after the last token."""
        short = self._last is not None and self._last.finish_reason == "length"
        self._status = "incomplete" if short else "completed"
        for _, block, _ in self._blocks.end():
            yield from self._ends(block, self._status)
        yield {"type": f"response.{self._status}", "response": self.body()}

    def fail(self, error: ApiError) -> Iterator[Event]:
        """The events where the answer breaks off."""
        self._status = "failed"
        yield {
            "type": "error",
            "code": error.code or error.kind,
            "message": error.message,
            "param": error.param,
        }
        failed = self.body() | {"error": {"code": "server_error", "message": error.message}}
        yield {"type": "response.failed", "response": failed}

    def body(self) -> Event:
        """The response as far as it has come."""
        asked, sampling = self._body, self._request.sampling
        echoed = {"text", "tool_choice", "tools"}
        given = asked.model_dump(include=echoed, exclude_unset=True, by_alias=True)
        incomplete = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        ended = self._status in ("completed", "incomplete")
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "background": False,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": None,
            "metadata": asked.metadata or {},
            "model": self._serving.names[0],
            "output": list(self._items),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "system_fingerprint": self._serving.fingerprint,
            "temperature": sampling.temperature,
            "text": given.get("text") or {"format": {"type": "text"}},
            "tool_choice": given.get("tool_choice") or "auto",
            "tools": given.get("tools") or [],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
            "user": asked.user,
        }

    def _usage(self) -> Event:
        prompt, cached = len(self._request.prompt_tokens), 0
        done = None if self._last is None else self._last.completion
        if done is not None and self._serving.options.enable_prompt_tokens_details:
            cached = done.cached_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": self._tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": prompt + self._tokens,
        }

    def _logprobs_of(self, delta: Delta) -> list[Event]:
        event = delta.event
        if not self._body.logprobs or event.logprob is None:
            return []
        return self._texts.chat_logprobs([(event.token, event.logprob, event.top_logprobs or ())])

    def _begins(self, block: Block) -> Iterator[Event]:
        item: Event = {"id": new_id(_PREFIXES[block.kind]), "status": "in_progress"}
        if block.kind == "content":
            item |= {"type": "message", "role": "assistant", "content": []}
        elif block.kind == "reasoning":
            item |= {"type": "reasoning", "summary": [], "content": [], "encrypted_content": None}
        else:
            item |= {"type": "function_call", "call_id": block.id, "name": block.name}
            item["arguments"] = ""
        self._items.append(item)
        yield {"type": "response.output_item.added", "output_index": block.number, "item": item}
        if block.kind != "call":
            item["content"].append(_part(block))
            yield self._in_part("response.content_part.added", block, part=_part(block))

    def _grows(self, block: Block, piece: str) -> Iterator[Event]:
        item = self._items[block.number]
        if block.kind == "call":
            item["arguments"] = block.text
            yield self._in_item("response.function_call_arguments.delta", block, delta=piece)
            return
        item["content"][0]["text"] = block.text
        if block.kind == "reasoning":
            yield self._in_part("response.reasoning_text.delta", block, delta=piece)
            return
        logprobs, self._logprobs = _last_of(self._logprobs, piece), []
        item["content"][0]["logprobs"] += logprobs
        yield self._in_part("response.output_text.delta", block, delta=piece, logprobs=logprobs)

    def _ends(self, block: Block, status: str) -> Iterator[Event]:
        item = self._items[block.number]
        item["status"] = status
        if block.kind == "call":
            yield self._in_item(
                "response.function_call_arguments.done",
                block,
                name=block.name,
                arguments=block.text,
            )
        else:
            (part,) = item["content"]
            if block.kind == "content":
                done = "response.output_text.done"
                yield self._in_part(done, block, text=block.text, logprobs=part["logprobs"])
            else:
                yield self._in_part("response.reasoning_text.done", block, text=block.text)
            yield self._in_part("response.content_part.done", block, part=part)
        yield {"type": "response.output_item.done", "output_index": block.number, "item": item}

    def _in_item(self, kind: str, block: Block, **further: Any) -> Event:
        where = {"item_id": self._items[block.number]["id"], "output_index": block.number}
        return {"type": kind, **where, **further}

    def _in_part(self, kind: str, block: Block, **further: Any) -> Event:
        return self._in_item(kind, block, content_index=0, **further)


def _last_of(logprobs: list[Event], text: str) -> list[Event]:
    """Of tokens' log-probabilities, those whose tokens have written a text, the last that came."""
    left, first = len(text.encode()), len(logprobs)
    while first and left > 0:
        first -= 1
        left -= len(logprobs[first]["bytes"])
    return [one for one in logprobs[first:] if one["bytes"]]


_PREFIXES = {"content": "msg_", "reasoning": "rs_", "call": "fc_"}


def _part(block: Block) -> Event:
    """The part of an item that a block's text goes into, while it has none."""
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


class _ResponseEvents:
    """The events of a response's stream, numbered."""

    idle = ": nothing new\n\n"

    def __init__(self, response: _Response):
        self._response = response
        self._number = 0

    def step(self, deltas: Sequence[Delta]) -> str:
        """The events of a step."""
        return self._first() + self._written(self._response.add(deltas))

    def end(self) -> str:
        """The events after the last step."""
        return self._first() + self._written(self._response.end())

    def error(self, error: ApiError) -> str:
        """The events where the answer breaks off."""
        return self._first() + self._written(self._response.fail(error))

    def _first(self) -> str:
        return "" if self._number else self._written(self._response.begin())

    def _written(self, events: Iterable[Event]) -> str:
        lines = []
        for event in events:
            body = {"type": event["type"], "sequence_number": self._number, **event}
            lines.append(f"event: {event['type']}\ndata: {to_json(body)}\n\n")
            self._number += 1
        return "".join(lines)
