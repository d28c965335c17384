# SPDX-License-Identifier: Apache-2.0
"""The grammar that an answer is held to: by the fields of a request that ask for a form.

What cannot be enforced is refused before anything is generated, in llguidance's words.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from meshwen.engine.grammar import (
    GrammarError,
    choice_grammar,
    json_object_grammar,
    json_rule,
    json_schema_grammar,
    lark_grammar,
    literal,
    regex_grammar,
)
from meshwen.errors import MeshwenError
from meshwen.server.errors import ApiError
from meshwen.server.output_formats import ResponseFormat, StructuredOutputs
from meshwen.server.serving import Serving

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


async def grammar_for(
    serving: Serving,
    *,
    response_format: ResponseFormat | None = None,
    structured_outputs: StructuredOutputs | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    must_call: bool = False,
    several_calls: bool = True,
) -> str | None:
    """What an answer is held to, for `SamplingParams.grammar`; None: its text is free.

    With a `response_format` and tools that may be called, the answer is JSON or calls. Compiling
    takes a thread, and few run at the same time.

    Args:
        serving: the model.
        response_format: OpenAI's field.
        structured_outputs: vLLM's.
        tools: those that may be called, as chat requests have them.
        must_call: the answer is a call of one of these.
        several_calls: or several calls.

    Raises:
        ApiError: 400: fields exclude each other, or the form cannot be enforced.
    """
    form = None if response_format and response_format.type == "text" else response_format
    given = [("response_format", form), ("structured_outputs", structured_outputs)]
    asked = [name for name, one in given if one is not None]
    if len(asked) > 1:
        raise ApiError(
            400, "response_format and structured_outputs exclude each other", param=asked[1]
        )
    if must_call and asked:
        raise ApiError(
            400, f"tool_choice asks for a call, and {asked[0]} for another form", param=asked[0]
        )
    if must_call:
        if serving.options.tool_call_parser == "none":
            raise ApiError(
                400, "tool_choice asks for a call, and this server parses none", param="tool_choice"
            )
        return await _enforced(serving, "tools", lambda: _calls("start", tools, several_calls))
    if form is not None:
        return await _enforced(
            serving, "response_format", lambda: _json(form, tools, several_calls)
        )
    if structured_outputs is not None:
        return await _enforced(
            serving, "structured_outputs", lambda: _structured(structured_outputs)
        )
    return None


async def _enforced(serving: Serving, field: str, make: Callable[[], str]) -> str:
    """A grammar that the engine takes."""
    try:
        grammar = await asyncio.to_thread(make)
        await serving.engine.check_grammar(grammar)
    except GrammarError as error:
        raise ApiError(400, f"{field} cannot be enforced: {error.reason}", param=field) from None
    except MeshwenError as error:
        raise ApiError(400, f"{field}: {error}", param=field) from None
    return grammar


def _json(form: ResponseFormat, tools: Sequence[Mapping[str, Any]], several: bool) -> str:
    schema: Mapping[str, Any] | None = {"type": "object"}
    if form.json_schema is not None:
        schema = form.json_schema.schema_
    answer = json_rule({} if schema is None else schema)
    if not tools:
        return f"start: {answer}"
    return f"start: answer | calls\nanswer: {answer}\n{_calls('calls', tools, several)}"


def _structured(asked: StructuredOutputs) -> str:
    if asked.choice is not None:
        return choice_grammar(asked.choice)
    if asked.regex is not None:
        return regex_grammar(asked.regex)
    if asked.grammar is not None:
        return lark_grammar(asked.grammar)
    return json_object_grammar() if asked.json_ is None else json_schema_grammar(asked.json_)


def _calls(rule: str, tools: Sequence[Mapping[str, Any]], several: bool) -> str:
    """Rules for calls as Qwen's chat template writes them; `rule` is the name of the first."""
    functions = [tool["function"] for tool in tools]
    rules = [f"{rule}: call{' (LINE call)*' if several else ''}", r'LINE: "\n"']
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        begin = f'<tool_call>\n{{"name": {literal(function["name"])}, "arguments": '
        arguments = json_rule(_arguments(function.get("parameters")))
        end = literal("}\n</tool_call>")
        rules.append(f"call_{i}: {literal(begin)} {arguments} {end}")
    return "\n".join(rules)


def _arguments(parameters: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The schema of a function's arguments: an object."""
    if not parameters:
        return _NO_ARGUMENTS
    if parameters.get("type", "object") != "object":
        raise GrammarError("parameters of a function must be of the type object")
    return {"type": "object", **parameters}
