# SPDX-License-Identifier: Apache-2.0
"""Forms of answers: the grammars that requests ask for, and what is refused before any token."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from meshwen.errors import MeshwenError
from serving import EOS, ScriptedEngine, grammars, in_loop, serving, tokenizer

CHAT, COMPLETIONS, TOKENS = "/v1/chat/completions", "/v1/completions", "/inference/v1/generate"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/n"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"n": {"type": "integer"}},
}
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "add_all", "description": "no parameters"}},
]
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ADD_ALL = '<tool_call>\n{"name": "add_all", "arguments": {}}\n</tool_call>'


def follows(grammar: str, text: str) -> bool:
    """Whether the tokens of a text, and then the end, may come."""
    one = grammars().compiled(grammar).constraint()
    tokens = tokenizer().encode(text, add_special_tokens=False)
    if one.fitting(tokens) < len(tokens):
        return False
    rows = np.zeros((1 + len(tokens), EOS + 1), bool)
    one.forbid(rows, tokens)
    return not rows[-1, EOS]


# The demo model's own knows no tools.
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def chat(**fields):
    return {"messages": [{"role": "user", "content": "Hi"}], **fields}


async def grammar_of(path, body) -> str | None:
    """The grammar that reaches the engine."""
    async with serving("{}", template=TEMPLATE) as server:
        response = await server.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return server.engine.requests[0].sampling.grammar


JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


@pytest.mark.parametrize(
    ("fields", "fitting", "wrong"),
    [
        ({"response_format": {"type": "json_object"}}, '{"b": [1]}', "[1]"),
        ({"response_format": JSON_SCHEMA}, '{"a": 1}', '{"b": [1]}'),
        ({"structured_outputs": {"json": SCHEMA}}, '{\n  "a": 1\n}', "{}"),
        ({"structured_outputs": {"json": '{"type": "integer"}'}}, "-12", "1.5"),
        ({"structured_outputs": {"json_object": True}}, "{}", "[]"),
        ({"structured_outputs": {"regex": "^a/b+$"}}, "a/bbb", "a/"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "no", "n"),
        ({"structured_outputs": {"grammar": 'root ::= "x" ("y" | "z")'}}, "xz", "x"),
        ({"structured_outputs": {"grammar": 'start: "x" /[yz]/'}}, "xz", "x"),
    ],
)
@in_loop
async def test_a_form_is_a_grammar_for_the_engine(fields, fitting, wrong):
    found = {await grammar_of(CHAT, chat(**fields))}
    found.add(await grammar_of(COMPLETIONS, {"prompt": "Hi", **fields}))
    if "structured_outputs" in fields:
        body = {"token_ids": [1, 2], "sampling_params": fields}
        found.add(await grammar_of(TOKENS, body))
    (grammar,) = found
    assert follows(grammar, fitting)
    assert not follows(grammar, wrong)
    assert not follows(grammar, f"{fitting} and more")


@in_loop
async def test_other_protocols_ask_for_forms_too():
    form = {"type": "json_schema", "name": "x", "schema": SCHEMA}
    body = {"input": "Hi", "text": {"format": form}}
    assert follows(await grammar_of("/v1/responses", body), '{"a": 1}')
    form = {"type": "json_schema", "schema": SCHEMA}
    body = {"max_tokens": 9, "model": "demo", "output_config": {"format": form}, **chat()}
    assert follows(await grammar_of("/v1/messages", body), '{"a": 1}')


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"tools": TOOLS},
        {"tools": TOOLS, "tool_choice": "auto"},
        {"tools": TOOLS, "tool_choice": "none"},
    ],
)
@in_loop
async def test_other_answers_are_free(fields):
    assert await grammar_of(CHAT, chat(**fields)) is None


NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    ("fields", "fitting", "wrong"),
    [
        ({"tool_choice": "required"}, [ADD, ADD_ALL, f"{ADD}\n{ADD_ALL}\n{ADD}"], ["", "Hi", "{}"]),
        (
            {"tool_choice": NAMED},
            [ADD, f"{ADD}\n{ADD}"],
            [ADD_ALL, f"{ADD}\n{ADD_ALL}", f"{ADD}\n"],
        ),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            [ADD, ADD_ALL],
            [f"{ADD}\n{ADD}"],
        ),
        (
            {"tool_choice": "auto", "response_format": {"type": "json_object"}},
            ["{}", ADD, f"{ADD}\n{ADD}"],
            ["Hi", f"{{}}\n{ADD}"],
        ),
    ],
)
@in_loop
async def test_calls_that_must_come_are_written_as_the_chat_template_writes_them(
    fields, fitting, wrong
):
    grammar = await grammar_of(CHAT, chat(tools=TOOLS, **fields))
    assert all(follows(grammar, text) for text in fitting)
    wrong = [*wrong, ADD.replace("1", '"1"'), ADD.replace("add", "sub"), f"x{ADD}", f"{ADD}."]
    wrong.append(ADD_ALL.replace("{}", '{"a": 1}'))
    assert not any(follows(grammar, text) for text in wrong)


@in_loop
async def test_calls_that_had_to_come_are_calls_of_the_answer():
    async with serving(f"{ADD}\n{ADD_ALL}", template=TEMPLATE) as server:
        body = chat(tools=TOOLS, tool_choice="required")
        response = await server.client.post(CHAT, json=body)
    (choice,) = response.json()["choices"]
    calls = [call["function"] for call in choice["message"]["tool_calls"]]
    assert calls == [
        {"name": "add", "arguments": '{"a": 1}'},
        {"name": "add_all", "arguments": "{}"},
    ]
    assert choice["finish_reason"] == "tool_calls"


def tool(parameters) -> dict:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def schema(value) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"response_format": schema({"not": {}})}, "response_format", "Unimplemented"),
        ({"response_format": schema({"type": "string", "format": "x"})}, "response_format", "x"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs", "look"),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs", "70000"),
        ({"structured_outputs": {"grammar": "start: b"}}, "structured_outputs", "b"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "JSON"),
        ({"tools": [tool({"not": {}})], "tool_choice": "required"}, "tools", "Unimplemented"),
        ({"tools": [tool({"type": "array"})], "tool_choice": "required"}, "tools", "object"),
        (
            {"response_format": JSON_SCHEMA, "structured_outputs": {"json_object": True}},
            "structured_outputs",
            "exclude",
        ),
        (
            {"response_format": JSON_SCHEMA, "tools": TOOLS, "tool_choice": "required"},
            "response_format",
            "tool_choice",
        ),
    ],
)
@in_loop
async def test_what_cannot_be_enforced_is_refused_before_any_token(fields, param, word):
    async with serving("H", template=TEMPLATE) as server:
        response = await server.client.post(CHAT, json=chat(**fields))
        assert not server.engine.requests
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert word in error["message"]
    assert param in error["message"]


@in_loop
async def test_calls_cannot_be_asked_for_where_none_is_parsed():
    async with serving("H", tool_call_parser="none") as server:
        body = chat(tools=TOOLS, tool_choice="required")
        response = await server.client.post(CHAT, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tool_choice")


@in_loop
async def test_grammars_are_compiled_in_other_threads():
    threads = set()

    class Watching(ScriptedEngine):
        def check_grammar(self, grammar: str) -> None:
            threads.add(threading.current_thread())

    async with serving(Watching()) as server:
        body = chat(structured_outputs={"regex": "a+"})
        assert (await server.client.post(CHAT, json=body)).status_code == 200
    assert threads
    assert threading.main_thread() not in threads


@in_loop
async def test_without_the_library_a_form_is_refused_with_what_to_install():
    class Without(ScriptedEngine):
        def check_grammar(self, grammar: str) -> None:
            raise MeshwenError("grammars need the package llguidance: pip install llguidance")

    async with serving(Without()) as server:
        body = chat(response_format={"type": "json_object"})
        response = await server.client.post(CHAT, json=body)
    assert response.status_code == 400
    assert "pip install" in response.json()["error"]["message"]


@pytest.mark.parametrize(("asked_too_much", "status"), [(True, 400), (False, 500)])
@in_loop
async def test_where_a_request_lets_nothing_come_the_fault_is_its_own(asked_too_much, status):
    class Failing(ScriptedEngine):
        def _event(self, one):
            done = self._completion(one, "error", None)
            done = replace(done, error="nothing may come", asked_too_much=asked_too_much)
            return replace(super()._event(one), completion=done)

    async with serving(Failing()) as server:
        response = await server.client.post(CHAT, json=chat(min_tokens=9))
    assert (response.status_code, response.json()["error"]["message"]) == (
        status,
        "nothing may come",
    )
