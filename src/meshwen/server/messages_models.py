# SPDX-License-Identifier: Apache-2.0
"""What a request to Anthropic's `/v1/messages` may hold, and what it asks as a chat completion."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from meshwen.server.fields import (
    Fields,
    Ignored,
    Refused,
    RefusedList,
    RefusedTrue,
    Stop,
    expecting,
)
from meshwen.server.tagged import tagged, text_or


class TextBlock(Fields):
    """Text."""

    type: Literal["text"]
    text: str
    citations: RefusedList = None
    cache_control: Ignored = None


class ThinkingBlock(Fields):
    """What the model thought, as it came in an answer."""

    type: Literal["thinking"]
    thinking: str
    signature: Ignored = None


class ToolUseBlock(Fields):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    toolset_name: Refused = None
    cache_control: Ignored = None
    caller: Ignored = None


_OnlyText = Annotated[TextBlock, tagged({"text": TextBlock}, "a content block")]


class ToolResultBlock(Fields):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[str | list[TextBlock], text_or(_OnlyText)] = ""
    is_error: bool | None = None
    toolset_name: Refused = None
    cache_control: Ignored = None


_Block = Annotated[
    TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock,
    tagged(
        {
            "text": TextBlock,
            "thinking": ThinkingBlock,
            "tool_use": ToolUseBlock,
            "tool_result": ToolResultBlock,
        },
        "a content block",
    ),
]
_ALLOWED: dict[str, tuple[type[Fields], ...]] = {
    "user": (TextBlock, ToolResultBlock),
    "assistant": (TextBlock, ThinkingBlock, ToolUseBlock),
    "system": (TextBlock,),
}


class Message(Fields):
    """A turn of the conversation."""

    role: Annotated[Literal["user", "assistant", "system"], expecting("user or assistant")]
    content: Annotated[
        str | list[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock],
        text_or(_Block),
    ]

    @model_validator(mode="after")
    def _check_blocks(self) -> Message:
        for block in self.blocks:
            if not isinstance(block, _ALLOWED[self.role]):
                raise ValueError(f"a message of the {self.role} has no block {block.type}")
        return self

    @property
    def blocks(self) -> list[Any]:
        """The content as blocks."""
        if isinstance(self.content, str):
            return [TextBlock(type="text", text=self.content)]
        return self.content


class Tool(Fields):
    """A function that may be called."""

    type: Annotated[
        Literal["custom"] | None, expecting('"custom"; there are no other tools here')
    ] = None
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    allowed_callers: Annotated[list[Literal["direct"]], expecting('["direct"]')] | None = None
    defer_loading: RefusedTrue = None
    input_examples: RefusedList = None
    cache_control: Ignored = None
    eager_input_streaming: Ignored = None

    def for_chat(self) -> dict[str, Any]:
        """The tool as chat templates take it."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema,
            "strict": self.strict,
        }
        return {
            "type": "function",
            "function": {key: value for key, value in function.items() if value is not None},
        }


class ToolChoice(Fields):
    """Whether tools are called, and which."""

    type: Annotated[Literal["auto", "any", "tool", "none"], expecting("auto, any, tool or none")]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check_name(self) -> ToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("name goes with the type tool, and with no other")
        return self

    def for_chat(self) -> Any:
        """The choice as chat completions have it."""
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return {"any": "required"}.get(self.type, self.type)


class Thinking(Fields):
    """Whether the model thinks before it answers.

    Attributes:
        type: whether.
        budget_tokens: about how many tokens; a target that is not enforced.
        display: how it is shown.
    """

    type: Annotated[
        Literal["enabled", "adaptive", "disabled"], expecting("enabled, adaptive or disabled")
    ]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: Annotated[Literal["summarized"] | None, expecting("summarized")] = None


class OutputFormat(Fields):
    """A schema that the answer follows."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Fields):
    """The form of the answer."""

    format: OutputFormat | None = None
    effort: Refused = None


class CountRequest(Fields):
    """The body of a request for the number of a prompt's tokens."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    system: Annotated[str | list[TextBlock], text_or(_OnlyText)] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    thread: dict[str, Any] | None = None  # Refused with what its clients look for.

    context_management: Refused = None
    mcp_servers: RefusedList = None

    cache_control: Ignored = None
    user_profile_id: Ignored = None

    @model_validator(mode="after")
    def _check_last(self) -> CountRequest:
        if any(isinstance(block, ToolUseBlock) for block in self.messages[-1].blocks):
            raise ValueError("the last message has a tool_use block: send its tool_result, too")
        return self

    def for_chat(self) -> dict[str, Any]:
        """The fields of the chat completion that asks the same."""
        choice, form = self.tool_choice, self.output_config and self.output_config.format
        variables = dict(self.chat_template_kwargs or {})
        if self.thinking is not None:
            variables["enable_thinking"] = self.thinking.type != "disabled"
        last = self.messages[-1]
        return {
            "model": self.model,
            "messages": _turns(self.system, self.messages),
            "tools": [one.for_chat() for one in self.tools or []] or None,
            "tool_choice": choice and choice.for_chat(),
            "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
            "continue_final_message": last.role == "assistant" or None,
            "chat_template_kwargs": variables or None,
            "response_format": form
            and {
                "type": "json_schema",
                "json_schema": {"name": "output", "schema": form.schema_, "strict": True},
            },
        }


class MessagesRequest(CountRequest):
    """The body of a request for a message."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Stop = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None

    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None

    container: Refused = None

    diagnostics: Ignored = None
    inference_geo: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    speed: Ignored = None
    workspace_id: Ignored = None

    def for_chat(self) -> dict[str, Any]:
        """The fields of the chat completion that asks the same."""
        same = ("temperature", "top_k", "top_p", "cache_salt", "min_p", "repetition_penalty")
        return {
            **super().for_chat(),
            **{name: getattr(self, name) for name in (*same, "seed", "stream")},
            "max_completion_tokens": self.max_tokens,
            "stop": self.stop_sequences,
        }


def _turns(system: str | list[TextBlock] | None, messages: list[Message]) -> list[dict[str, Any]]:
    """The conversation as chat completions have it: successive turns of one role are one."""
    turns = [{"role": "system", "content": _joined(system)}] if system else []
    for role, several in groupby(messages, key=lambda one: one.role):
        blocks = [block for one in several for block in one.blocks]
        turns += [_assistant(blocks)] if role == "assistant" else _others(role, blocks)
    return turns


def _assistant(blocks: list[Any]) -> dict[str, Any]:
    thinking = "".join(one.thinking for one in blocks if isinstance(one, ThinkingBlock))
    calls = [
        {
            "id": one.id,
            "type": "function",
            "function": {
                "name": one.name,
                "arguments": json.dumps(one.input, ensure_ascii=False),
            },
        }
        for one in blocks
        if isinstance(one, ToolUseBlock)
    ]
    # The pieces of an answer's text, which calls parted, have their line ends with them.
    turn: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(one.text for one in blocks if isinstance(one, TextBlock)),
    }
    turn |= {"reasoning_content": thinking} if thinking else {}
    return turn | ({"tool_calls": calls} if calls else {})


def _others(role: str, blocks: list[Any]) -> list[dict[str, Any]]:
    """Turns of a user, or the system; what tools gave are turns of their own."""
    turns: list[dict[str, Any]] = []
    for is_text, several in groupby(blocks, key=lambda one: isinstance(one, TextBlock)):
        if is_text:
            turns.append({"role": role, "content": _joined(list(several))})
        else:
            turns += [_result(one) for one in several]
    return turns


def _result(block: ToolResultBlock) -> dict[str, Any]:
    text = _joined(block.content)
    return {
        "role": "tool",
        "tool_call_id": block.tool_use_id,
        "content": f"Error: {text}" if block.is_error else text,
    }


def _joined(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(one.text for one in content)
