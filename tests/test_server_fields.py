# SPDX-License-Identifier: Apache-2.0
"""Every field of a request is in the docs, as the kind that it is."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from meshwen.server import messages_models as anthropic
from meshwen.server.chat_models import ChatMessage, ChatRequest, NamedToolChoice, Tool
from meshwen.server.completions import CompletionRequest
from meshwen.server.fields import (
    REFUSES,
    OpenAIFields,
    RequestFields,
    SamplingFields,
    StreamOptions,
)
from meshwen.server.output_formats import JsonSchema, ResponseFormat, StructuredOutputs
from meshwen.server.responses_models import (
    FunctionCall,
    FunctionCallOutput,
    FunctionTool,
    InputItem,
    InputMessage,
    NamedChoice,
    ReasoningConfig,
    ReasoningItem,
    ReasoningText,
    RefusalPart,
    ResponsesRequest,
    ResponseStreamOptions,
    TextConfig,
    TextFormat,
    TextPart,
)
from meshwen.server.tokens import TokenSampling, TokensRequest
from serving import in_loop, serving

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
# What is refused where the request is answered.
LATER = {"thread"}

# By the heading of the table: the models whose own fields it has, with what comes before these.
TABLES = {
    "Sampling of chat, completions and token ids": {"": SamplingFields},
    "Requests of chat, completions and token ids": {
        "": RequestFields,
        "stream_options.": StreamOptions,
    },
    "Chat and completions": {"": OpenAIFields},
    "Chat": {
        "": ChatRequest,
        "messages.": ChatMessage,
        "tools.": Tool,
        "tool_choice.": NamedToolChoice,
    },
    "Completions": {"": CompletionRequest},
    "Token ids": {"": TokensRequest, "sampling_params.": TokenSampling},
    "Forms of an answer": {
        "response_format.": ResponseFormat,
        "response_format.json_schema.": JsonSchema,
        "structured_outputs.": StructuredOutputs,
    },
    "Anthropic's messages": {"": anthropic.MessagesRequest},
    "Anthropic's messages and their count": {
        "": anthropic.CountRequest,
        "messages.": anthropic.Message,
        "content.text.": anthropic.TextBlock,
        "content.thinking.": anthropic.ThinkingBlock,
        "content.tool_use.": anthropic.ToolUseBlock,
        "content.tool_result.": anthropic.ToolResultBlock,
        "tools.": anthropic.Tool,
        "tool_choice.": anthropic.ToolChoice,
        "thinking.": anthropic.Thinking,
        "output_config.": anthropic.OutputConfig,
        "output_config.format.": anthropic.OutputFormat,
    },
    "Responses": {
        "": ResponsesRequest,
        "input.": InputItem,
        "input.message.": InputMessage,
        "input.function_call.": FunctionCall,
        "input.function_call_output.": FunctionCallOutput,
        "input.reasoning.": ReasoningItem,
        "reasoning_text.": ReasoningText,
        "output_text.": TextPart,
        "refusal.": RefusalPart,
        "tools.": FunctionTool,
        "tool_choice.": NamedChoice,
        "text.": TextConfig,
        "text.format.": TextFormat,
        "reasoning.": ReasoningConfig,
        "stream_options.": ResponseStreamOptions,
    },
}


def documented(title: str) -> dict[str, str]:
    """The fields of a table with their kinds."""
    text = PAGE.read_text("utf-8")
    (table,) = re.findall(rf"^### {title}\n\n(.*?)\n\n", text + "\n", re.MULTILINE | re.DOTALL)
    found = {}
    for row in table.splitlines()[2:]:
        names, kind, test, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        assert re.fullmatch(r"\[`test_\w+`\]\(\.\./tests/test_\w+\.py\)", test), row
        for name in re.findall(r"`([\w.]+)`", names):
            assert name not in found, name
            found[name] = kind
    return found


def kind(name: str, field: Any) -> str:
    if name in LATER or REFUSES in field.metadata:
        return "refused"
    return "not applicable" if field.annotation is Any else "supported"


@pytest.mark.parametrize("title", TABLES)
def test_a_table_has_the_fields_that_there_are_as_what_they_are(title):
    expected = {}
    for prefix, model in TABLES[title].items():
        for name, field in model.model_fields.items():
            if name in model.__annotations__:
                expected[prefix + (field.alias or name)] = kind(name, field)
    assert documented(title) == expected


# The least that each model takes.
LEAST = {
    ChatRequest: {"messages": [{"role": "user", "content": "x"}]},
    ChatMessage: {"role": "user", "content": "x"},
    Tool: {"type": "function", "function": {"name": "x"}},
    CompletionRequest: {"prompt": "x"},
    TokensRequest: {"token_ids": [1]},
    TokenSampling: {},
    StreamOptions: {},
    StructuredOutputs: {"regex": "x"},
    anthropic.MessagesRequest: {
        "model": "x",
        "max_tokens": 1,
        "messages": [{"role": "user", "content": "x"}],
    },
    anthropic.CountRequest: {"model": "x", "messages": [{"role": "user", "content": "x"}]},
    anthropic.TextBlock: {"type": "text", "text": "x"},
    anthropic.ThinkingBlock: {"type": "thinking", "thinking": "x"},
    anthropic.ToolUseBlock: {"type": "tool_use", "id": "x", "name": "x", "input": {}},
    anthropic.ToolResultBlock: {"type": "tool_result", "tool_use_id": "x"},
    anthropic.Tool: {"name": "x", "input_schema": {}},
    anthropic.OutputConfig: {},
    ResponsesRequest: {"input": "x"},
    InputMessage: {"role": "user", "content": "x"},
    FunctionCall: {"type": "function_call", "call_id": "x", "name": "x", "arguments": "{}"},
    FunctionCallOutput: {"type": "function_call_output", "call_id": "x", "output": "x"},
    ReasoningItem: {"type": "reasoning"},
    TextPart: {"type": "output_text", "text": "x"},
    FunctionTool: {"type": "function", "name": "x"},
    TextConfig: {},
    ReasoningConfig: {},
    ResponseStreamOptions: {},
}


@pytest.mark.parametrize("model", LEAST, ids=lambda model: model.__name__)
def test_what_is_refused_is_refused_by_name_and_what_is_ignored_is_taken(model):
    model.model_validate(LEAST[model])
    for name, field in model.model_fields.items():
        if kind("", field) == "not applicable":
            model.model_validate(LEAST[model] | {name: {"x": [1]}})
        if kind("", field) == "refused":
            with pytest.raises(ValidationError, match="not supported") as caught:
                model.model_validate(LEAST[model] | {name: {"x": [1]}})
            assert [error["loc"] for error in caught.value.errors()] == [(name,)]
    with pytest.raises(ValidationError, match="not permitted"):
        model.model_validate(LEAST[model] | {"no_such_field": 1})


@in_loop
async def test_the_document_of_the_interface_knows_errors_and_streams():
    async with serving("H") as server:
        document = (await server.client.get("/openapi.json")).json()
    streams = set()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            responses = operation["responses"]
            assert "422" not in responses  # What is wrong is answered with 400.
            assert {"4XX", "5XX"} < responses.keys()
            if "text/event-stream" in responses["200"].get("content", {}):
                streams.add(path)
    assert streams == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/messages",
        "/v1/responses",
        "/inference/v1/generate",
    }
