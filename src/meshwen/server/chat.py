# SPDX-License-Identifier: Apache-2.0
"""`/v1/chat/completions`: OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from meshwen.common.arguments import brief
from meshwen.engine.request import Request
from meshwen.errors import MeshwenError
from meshwen.server.chat_models import ChatRequest, NamedToolChoice
from meshwen.server.errors import ApiError
from meshwen.server.fields import check_model, check_no_prompt_logprobs_in_stream
from meshwen.server.generation import Delta, Generation, generate
from meshwen.server.parsers import parser_of
from meshwen.server.parsing import ToolCallDelta
from meshwen.server.prompts import chat_prompt
from meshwen.server.replies import Envelope, json_response
from meshwen.server.serving import Serving
from meshwen.server.sse import STREAMED, OpenAIEvents, event_stream
from meshwen.server.structured import grammar_for
from meshwen.server.token_texts import TokenTexts
from meshwen.tokenizer.chat_template import check_template_kwargs

router = APIRouter()


@router.post("/v1/chat/completions", responses=STREAMED)
async def create_chat_completion(body: ChatRequest, http_request: HttpRequest) -> Response:
    """Continues a conversation."""
    serving: Serving = http_request.app.state.serving
    check_model(serving, body.model)
    check_no_prompt_logprobs_in_stream(body, body.stream)
    generation = await generation_of(serving, body)
    steps = generate(serving, generation, http_request)
    if body.stream:
        return await event_stream(steps, _ChatEvents(serving, body, generation))
    return json_response(await _whole(steps, serving, body, generation))


async def generation_of(serving: Serving, body: ChatRequest) -> Generation:
    """What a request asks of the engine.

    Raises:
        ApiError: 400: it cannot be asked.
    """
    tools = _callable_tools(body)
    grammar = await grammar_for(
        serving,
        response_format=body.response_format,
        structured_outputs=body.structured_outputs,
        tools=_tools_of_grammar(body, tools),
        must_call=body.tool_choice not in (None, "none", "auto"),
        several_calls=body.parallel_tool_calls is not False,
    )
    sampling = body.sampling_params(
        serving,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=grammar,
    )
    prompt = await prompt_of(serving, body)
    parser = parser_of(
        serving,
        prompt,
        [tool["function"]["name"] for tool in tools],
        most_calls=1 if body.parallel_tool_calls is False else None,
        constrained=grammar is not None,
    )
    return Generation((Request(prompt, sampling, body.cache_salt or ""),), parser)


def _callable_tools(body: ChatRequest) -> list[dict[str, Any]]:
    """The tools that may be called, as the request has them."""
    tools = body.tools or []
    if not tools and body.tool_choice not in (None, "none", "auto"):
        raise ApiError(400, "tool_choice asks for a call, and there are no tools", param="tools")
    if isinstance(body.tool_choice, NamedToolChoice):
        name = body.tool_choice.function.name
        if all(tool["function"]["name"] != name for tool in tools):
            raise ApiError(400, f"tool_choice {brief(name)} is none of tools", param="tool_choice")
    return [] if body.tool_choice == "none" else tools


def _tools_of_grammar(body: ChatRequest, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools of which the answer may have calls: the one that is named, or all."""
    if not isinstance(body.tool_choice, NamedToolChoice):
        return tools
    return [one for one in tools if one["function"]["name"] == body.tool_choice.function.name][:1]


async def prompt_of(
    serving: Serving, body: ChatRequest, *, limited: bool = True
) -> tuple[int, ...]:
    """A request's prompt.

    Args:
        serving: the model.
        body: the request.
        limited: whether there must be room for an answer.

    Raises:
        ApiError: 400: it has none.
    """
    return await chat_prompt(
        serving,
        [one.for_template(f"messages[{i}]") for i, one in enumerate(body.messages)],
        tools=_callable_tools(body) or None,
        limited=limited,
        **_template_variables(body),
    )


def _template_variables(body: ChatRequest) -> dict[str, Any]:
    """What the chat template gets beside messages and tools."""
    try:
        variables = check_template_kwargs(body.chat_template_kwargs or {})
    except MeshwenError as error:
        raise ApiError(400, str(error), param="chat_template_kwargs") from None
    if taken := variables.keys() & _OWN_FIELDS:
        raise ApiError(
            400,
            f"chat_template_kwargs cannot set {min(taken)}, which is a field of the request",
            param="chat_template_kwargs",
        )
    if body.continue_final_message and body.add_generation_prompt:
        raise ApiError(
            400,
            "continue_final_message goes on with the last message, add_generation_prompt begins "
            "another: give one of them",
            param="continue_final_message",
        )
    opens = not body.continue_final_message and body.add_generation_prompt is not False
    variables["add_generation_prompt"] = opens
    if body.continue_final_message:
        variables["continue_final_message"] = True
    if body.documents:
        variables["documents"] = body.documents
    return variables


# What the request sets by fields of its own.
_OWN_FIELDS = {
    *("tools", "documents", "add_generation_prompt", "continue_final_message"),
    *("param", "limited", "serving"),
}


@dataclass
class _Choice:
    """One answer as it grows."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    last: Delta | None = None

    def add(self, delta: Delta) -> None:
        """Adds the text of a delta."""
        self.content += delta.content
        self.reasoning += delta.reasoning
        for call in delta.tool_calls:
            if call.name is not None:
                self.calls.append(_call(call))
            else:
                self.calls[call.index]["function"]["arguments"] += call.arguments
        self.tokens.append(delta.event.token)
        self.last = delta

    def body(self, index: int, body: ChatRequest) -> dict[str, Any]:
        """The choice as a response has it."""
        assert self.last is not None
        assert self.last.completion is not None
        message: dict[str, Any] = {
            "role": "assistant",
            "content": self.content or (None if self.calls else ""),
            "refusal": None,
        }
        if self.reasoning and body.include_reasoning is not False:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        choice = {
            "index": index,
            "message": message,
            "logprobs": {"content": self.logprobs, "refusal": None} if body.logprobs else None,
            "finish_reason": self.last.finish_reason,
            "stop_reason": self.last.completion.stop_reason,
        }
        return choice | ({"token_ids": self.tokens} if body.return_token_ids else {})


def _call(call: ToolCallDelta) -> dict[str, Any]:
    """A call's beginning."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _logprobs(texts: TokenTexts, delta: Delta, count: int) -> list[dict[str, Any]]:
    """Those of a delta's token, with so many of the likeliest."""
    event = delta.event
    assert event.logprob is not None
    return texts.chat_logprobs([(event.token, event.logprob, (event.top_logprobs or ())[:count])])


async def _whole(
    steps: AsyncGenerator[list[Delta], None],
    serving: Serving,
    body: ChatRequest,
    generation: Generation,
) -> dict[str, Any]:
    """The response, once all answers are whole."""
    (request,) = generation.requests
    envelope = Envelope(serving, "chatcmpl-", "chat.completion", generation.requests)
    texts = TokenTexts(serving.tokenizer, body.return_tokens_as_token_ids)
    choices = [_Choice() for _ in range(request.sampling.n)]
    async with aclosing(steps):
        async for deltas in steps:
            envelope.usage.add(deltas)
            for delta in deltas:
                choices[delta.index].add(delta)
                if body.logprobs:
                    found = _logprobs(texts, delta, body.top_logprobs or 0)
                    choices[delta.index].logprobs += found
    further: dict[str, Any] = {"usage": envelope.usage.body()}
    if body.prompt_logprobs is not None:
        assert choices[0].last is not None
        assert choices[0].last.completion is not None
        done = choices[0].last.completion
        further["prompt_logprobs"] = texts.prompt_logprobs(done, body.prompt_logprobs)
    if body.return_token_ids:
        further["prompt_token_ids"] = list(request.prompt_tokens)
    return envelope.body([one.body(i, body) for i, one in enumerate(choices)], **further)


class _ChatEvents(OpenAIEvents):
    """Chunks of a stream: each choice begins with its role, and ends with its finish reason."""

    def __init__(self, serving: Serving, body: ChatRequest, generation: Generation):
        (request,) = generation.requests
        envelope = Envelope(serving, "chatcmpl-", "chat.completion.chunk", generation.requests)
        super().__init__(envelope, body.include_usage, body.continuous_usage)
        self._body, self._prompt = body, request.prompt_tokens
        self._texts = TokenTexts(serving.tokenizer, body.return_tokens_as_token_ids)
        self._begun: set[int] = set()

    def chunks(self, delta: Delta) -> Iterable[dict[str, Any]]:
        """A delta's."""
        if delta.index not in self._begun:
            yield self._first(delta.index)
        body, parts = self._body, _parts(delta, self._body.include_reasoning is not False)
        logprobs = None
        if body.logprobs:
            logprobs = {
                "content": _logprobs(self._texts, delta, body.top_logprobs or 0),
                "refusal": None,
            }
        ids = {"token_ids": [delta.event.token]} if body.return_token_ids else {}
        if not parts and (logprobs or ids):
            parts = [{"content": ""}]
        for part in parts:  # What is of the token comes once, with the first of them.
            yield self._chunk(delta.index, part, logprobs, **ids)
            logprobs, ids = None, {"token_ids": []} if ids else {}
        if delta.completion is not None:
            reason, stop = delta.finish_reason, delta.completion.stop_reason
            yield self._chunk(delta.index, {}, finish_reason=reason, stop_reason=stop)

    def _first(self, index: int) -> dict[str, Any]:
        chunk = self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
        if self._body.return_token_ids and not self._begun:
            chunk["prompt_token_ids"] = list(self._prompt)
        self._begun.add(index)
        return chunk

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Any = None,
        **further: Any,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": None,
        }
        return self.envelope.body([choice | further])


def _parts(delta: Delta, with_reasoning: bool) -> list[dict[str, Any]]:
    """A delta's text and pieces of calls, each as the `delta` of a chunk."""
    parts: list[dict[str, Any]] = []
    if delta.reasoning and with_reasoning:
        parts.append({"reasoning_content": delta.reasoning})
    if delta.content:
        parts.append({"content": delta.content})
    for call in delta.tool_calls:
        piece: dict[str, Any] = {"index": call.index}
        if call.name is not None:
            piece |= _call(call)
        else:
            piece["function"] = {"arguments": call.arguments}
        parts.append({"tool_calls": [piece]})
    return parts
