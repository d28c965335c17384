# SPDX-License-Identifier: Apache-2.0
"""What a request to `/v1/responses` may hold, and what it asks as a chat completion."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, WrapValidator, model_validator

from meshwen.server.fields import (
    REFUSES,
    Fields,
    Ignored,
    Refused,
    RefusedList,
    RefusedTrue,
    TopLogprobs,
    expecting,
)
from meshwen.server.tagged import tagged, text_or


class TextPart(Fields):
    """Text of any role."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Ignored = None
    logprobs: Ignored = None
    prompt_cache_breakpoint: Ignored = None


class RefusalPart(Fields):
    """Why the model did not answer."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """What is shown of it."""
        return self.refusal


_Part = Annotated[
    TextPart | RefusalPart,
    tagged(
        {"input_text": TextPart, "output_text": TextPart, "text": TextPart, "refusal": RefusalPart},
        "a part",
    ),
]
_Content = Annotated[str | list[TextPart | RefusalPart], text_or(_Part)]


class InputItem(Fields):
    """What items have beside their content."""

    id: Ignored = None
    status: Ignored = None


class InputMessage(InputItem):
    """A turn of the conversation."""

    type: Literal["message"] = "message"
    role: Annotated[
        Literal["user", "assistant", "system", "developer"],
        expecting("user, assistant, system or developer"),
    ]
    content: _Content
    phase: Ignored = None


class FunctionCall(InputItem):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    namespace: Refused = None
    caller: Ignored = None


class FunctionCallOutput(InputItem):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: _Content
    namespace: Refused = None
    caller: Ignored = None
    name: Ignored = None


class ReasoningText(Fields):
    """What the model thought, or what is told of it."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(InputItem):
    """What the model thought, as it came in an answer."""

    type: Literal["reasoning"]
    summary: list[ReasoningText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: Refused = None

    @property
    def text(self) -> str:
        """The thoughts; where there are none, their summary."""
        return "".join(one.text for one in self.content or self.summary or [])


def _or_stored(value: Any, handler: Any) -> Any:
    if isinstance(value, dict) and value.get("type") == "item_reference":
        raise ValueError("item_reference is not supported: nothing is stored here; send the item")
    return handler(value)


_AnyItem = Annotated[
    InputMessage | FunctionCall | FunctionCallOutput | ReasoningItem,
    tagged(
        {
            "message": InputMessage,
            "function_call": FunctionCall,
            "function_call_output": FunctionCallOutput,
            "reasoning": ReasoningItem,
        },
        "an input item",
        default="message",
    ),
    WrapValidator(_or_stored),
]


class FunctionTool(Fields):
    """A function that may be called."""

    type: Annotated[Literal["function"], expecting('"function"; there are no other tools here')]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: Annotated[list[Literal["direct"]] | None, expecting('["direct"]')] = None
    defer_loading: RefusedTrue = None
    output_schema: Refused = None

    def for_chat(self) -> dict[str, Any]:
        """The tool as chat completions have it."""
        names = ("name", "description", "parameters", "strict")
        found = {name: value for name in names if (value := getattr(self, name)) is not None}
        return {"type": "function", "function": found}


class NamedChoice(Fields):
    """The function that must be called."""

    type: Literal["function"]
    name: str


class TextFormat(Fields):
    """The form of the answer."""

    type: Annotated[
        Literal["text", "json_object", "json_schema"],
        expecting("text, json_object or json_schema"),
    ]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("schema goes with the type json_schema, and with no other")
        return self

    def for_chat(self) -> dict[str, Any]:
        """The form as chat completions have it."""
        if self.schema_ is None:
            return {"type": self.type}
        schema = {"name": self.name or "output", "schema": self.schema_, "strict": self.strict}
        return {"type": self.type, "json_schema": schema}


class TextConfig(Fields):
    """How the text is written."""

    format: TextFormat | None = None
    verbosity: Refused = None


class ReasoningConfig(Fields):
    """How the model thinks."""

    context: Refused = None
    effort: Refused = None
    mode: Annotated[Literal["standard"] | None, expecting('"standard"')] = None
    generate_summary: Ignored = None
    summary: Ignored = None


class ResponseStreamOptions(Fields):
    """What a stream has beside the answer."""

    include_obfuscation: Ignored = None


_LOGPROBS = "message.output_text.logprobs"


def _not_stored(value: Any, handler: Any) -> Any:
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(
            "this is not supported: nothing is stored here; send the whole conversation as input"
        ) from None


_Stored = Annotated[None, REFUSES, WrapValidator(_not_stored)]


class ResponsesRequest(Fields):
    """The body of a request for a response."""

    input: Annotated[
        str | list[InputMessage | FunctionCall | FunctionCallOutput | ReasoningItem],
        text_or(_AnyItem),
    ]
    model: str | None = None
    include: (
        list[
            Annotated[
                Literal["message.output_text.logprobs", "reasoning.encrypted_content"],
                expecting(f"{_LOGPROBS} or reasoning.encrypted_content"),
            ]
        ]
        | None
    ) = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    text: TextConfig | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedChoice | None,
        expecting("none, auto, required or the name of a function, as an object"),
    ] = None
    tools: list[FunctionTool] | None = None
    top_logprobs: TopLogprobs | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    truncation: Annotated[
        Literal["disabled"] | None, expecting('"disabled": nothing is left out of the input')
    ] = None
    user: str | None = None

    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None

    background: RefusedTrue = None
    context_management: RefusedList = None
    conversation: _Stored = None
    image: Refused = None
    moderation: Refused = None
    previous_response_id: _Stored = None
    prompt: _Stored = None

    access_programs: Ignored = None
    background_options: Ignored = None
    max_tool_calls: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None

    @property
    def logprobs(self) -> bool:
        """Whether the answer has log-probabilities."""
        return _LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def for_chat(self) -> dict[str, Any]:
        """The fields of the chat completion that asks the same."""
        same = ("model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        further = ("cache_salt", "chat_template_kwargs", "parallel_tool_calls", "stream")
        form, choice = self.text and self.text.format, self.tool_choice
        named = isinstance(choice, NamedChoice)
        return {
            **{name: getattr(self, name) for name in (*same, *further)},
            "messages": _turns(self),
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": self.logprobs or None,
            "top_logprobs": self.top_logprobs if self.logprobs else None,
            "tools": [one.for_chat() for one in self.tools or []] or None,
            "tool_choice": {"type": "function", "function": {"name": choice.name}}
            if isinstance(choice, NamedChoice) and named
            else choice,
            "response_format": form and form.for_chat(),
        }


def _turns(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The conversation as chat completions have it."""
    turns: list[dict[str, Any]] = []
    if body.instructions is not None:
        turns.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*turns, {"role": "user", "content": body.input}]
    before: InputItem | None = None
    for item in body.input:
        if isinstance(item, FunctionCallOutput):
            text = _joined(item.output)
            turns.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
        elif isinstance(item, InputMessage) and item.role != "assistant":
            turns.append({"role": item.role, "content": _joined(item.content)})
        else:
            _add_to_answer(turns, item, before)
        before = item
    return turns


def _add_to_answer(turns: list[dict[str, Any]], item: InputItem, before: InputItem | None) -> None:
    """Adds what the model wrote to its last turn, if it may be a part of that; or to a new one."""
    is_new = not turns or turns[-1]["role"] != "assistant"
    is_new |= isinstance(item, ReasoningItem) and not isinstance(before, ReasoningItem)
    if is_new or (isinstance(item, InputMessage) and isinstance(before, InputMessage)):
        turns.append({"role": "assistant", "content": ""})
    turn = turns[-1]
    if isinstance(item, ReasoningItem):
        turn["reasoning_content"] = turn.get("reasoning_content", "") + item.text
    elif isinstance(item, FunctionCall):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        turn.setdefault("tool_calls", []).append(call)
    elif isinstance(item, InputMessage):
        # The pieces of an answer's text, which calls parted, have their line ends with them.
        turn["content"] += _joined(item.content, "")


def _joined(content: str | list[TextPart | RefusalPart], by: str = "\n") -> str:
    return content if isinstance(content, str) else by.join(one.text for one in content)
