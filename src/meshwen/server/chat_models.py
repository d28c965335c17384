# SPDX-License-Identifier: Apache-2.0
"""What a request for a chat completion may hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, WrapValidator, model_validator
from pydantic_core import from_json

from meshwen.common.json_files import parse_json
from meshwen.errors import MeshwenError
from meshwen.server.errors import ApiError
from meshwen.server.fields import (
    Fields,
    Ignored,
    OpenAIFields,
    Refused,
    RefusedTrue,
    TopLogprobs,
    expecting,
)
from meshwen.server.output_formats import ResponseFormat, StructuredOutputs

_MOST_TOOLS = 1024


class _TextPart(Fields):
    """A part of a message: text."""

    type: Literal["text"]
    text: str
    cache_control: Ignored = None


class _RefusalPart(Fields):
    """A part of an assistant's message: why it did not answer."""

    type: Literal["refusal"]
    refusal: str


def _part(value: Any, _: Any) -> _TextPart | _RefusalPart:
    """Reads a part by its kind; refuses by its kind what this model cannot read."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if isinstance(kind, str) and kind not in ("text", "refusal"):
        raise ValueError(f"{kind[:40]!r} is not supported: this model reads text alone")
    return (_RefusalPart if kind == "refusal" else _TextPart).model_validate(value)


_Part = Annotated[_TextPart | _RefusalPart, WrapValidator(_part)]
_parts: TypeAdapter[list[_TextPart | _RefusalPart]] = TypeAdapter(list[_Part])


def _content(value: Any, _: Any) -> Any:
    """Reads text, or parts of it."""
    if isinstance(value, list):
        return _parts.validate_python(value)
    if value is None or isinstance(value, str):
        return value
    raise ValueError("must be text, or a list of parts of text")


class _CalledFunction(Fields):
    """A function that the assistant called."""

    name: str
    arguments: str


class _ToolCall(Fields):
    """A call that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: _CalledFunction
    index: Ignored = None


class ChatMessage(Fields):
    """A turn of the conversation, as clients send it, or send back what they got."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"],
        expecting("system, developer, user, assistant or tool"),
    ]
    content: Annotated[str | list[_Part] | None, WrapValidator(_content)] = None
    name: str | None = None
    reasoning: str | None = None  # Another name, in some servers' answers, for the next.
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[_ToolCall] | None = None

    audio: Refused = None
    function_call: Refused = None

    annotations: Ignored = None

    @model_validator(mode="after")
    def _check_role(self) -> ChatMessage:
        if self.role == "assistant":
            if self.content is None and not (self.tool_calls or self.refusal):
                raise ValueError("an assistant's message needs content or tool_calls")
            return self
        if self.content is None:
            raise ValueError(f"content is missing: a message of {self.role} needs it")
        if self.tool_calls:
            raise ValueError(f"tool_calls are the assistant's, and this message is of {self.role}")
        return self

    def for_template(self, where: str) -> dict[str, Any]:
        """The message as chat templates take it: text, and arguments of calls as objects.

        Args:
            where: the message's path in the request, for errors.

        Raises:
            ApiError: arguments of a call are no JSON object.
        """
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self._text(),
        }
        for name, value in (
            ("name", self.name),
            ("reasoning_content", self.reasoning_content or self.reasoning),
            ("tool_call_id", self.tool_call_id),
        ):
            if value is not None:
                message[name] = value
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(
                            call.function.arguments, f"{where}.tool_calls[{i}].function.arguments"
                        ),
                    },
                }
                for i, call in enumerate(self.tool_calls)
            ]
        return message

    def _text(self) -> str:
        if isinstance(self.content, list):
            parts = [p.text if isinstance(p, _TextPart) else p.refusal for p in self.content]
            return "\n".join(parts)
        return self.content or self.refusal or ""


def _arguments(text: str, where: str) -> dict[str, Any]:
    """A call's arguments from their JSON text; none at all are {}.

    Those that broke off, at a limit or where they ceased to be JSON, are read as far as they go.
    """
    try:
        found = parse_json(text, where) if text.strip() else {}
    except MeshwenError as error:
        try:
            whole = json.dumps(from_json(text, allow_partial="trailing-strings"), allow_nan=False)
            found = parse_json(whole, where)
        except (ValueError, MeshwenError):
            raise ApiError(400, str(error), param=where) from None
    if not isinstance(found, dict):
        raise ApiError(400, f"{where} must be the text of a JSON object", param=where)
    return found


class _Function(Fields):
    """A function that may be called."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    """A tool that may be called."""

    type: Annotated[Literal["function"], expecting('"function"; there are no other tools here')]
    function: _Function
    cache_control: Ignored = None


def _check_tool(value: dict[str, Any]) -> dict[str, Any]:
    """Checks a tool, and keeps it as it was written: the chat template shows it to the model."""
    Tool.model_validate(value)
    return value


Messages = Annotated[list[ChatMessage], Field(min_length=1)]
Tools = Annotated[
    list[Annotated[dict[str, Any], AfterValidator(_check_tool)]], Field(max_length=_MOST_TOOLS)
]


class _NamedFunction(Fields):
    """A function by its name."""

    name: str


class NamedToolChoice(Fields):
    """The tool that must be called."""

    type: Literal["function"] = "function"
    function: _NamedFunction


class ChatRequest(OpenAIFields):
    """The body of a request for a chat completion."""

    messages: Messages
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    include_reasoning: bool | None = None
    logprobs: bool | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    modalities: Annotated[list[Literal["text"]], expecting('["text"]')] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedToolChoice | None,
        expecting("none, auto, required or the name of a function, as an object"),
    ] = None
    tools: Tools | None = None
    top_logprobs: TopLogprobs | None = None

    add_special_tokens: RefusedTrue = None
    audio: Refused = None
    chat_template: Refused = None
    echo: RefusedTrue = None
    function_call: Refused = None
    functions: Refused = None
    media_io_kwargs: Refused = None
    mm_processor_kwargs: Refused = None
    reasoning_effort: Refused = None
    verbosity: Refused = None
    web_search_options: Refused = None

    prediction: Ignored = None

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens are one limit; give one of them")
        return self
