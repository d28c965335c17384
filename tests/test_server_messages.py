# SPDX-License-Identifier: Apache-2.0
"""Anthropic's interface: what is asked of the model, and messages whole and streamed."""

import asyncio
import json

import pytest

from answer_texts import TEMPLATE, THINKING, call
from meshwen.server.blocks import Block
from serving import MAX_MODEL_LEN, ScriptedEngine, in_loop, serving, tokenizer

PATH = "/v1/messages"
BODY = {"model": "demo", "max_tokens": 200, "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"name": "now", "description": "The time.", "input_schema": {"type": "object"}}


async def ask(server, **fields):
    response = await server.client.post(PATH, json=BODY | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def stream(server, **fields):
    """The events of a stream."""
    response = await server.client.post(PATH, json=BODY | fields | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def rebuilt(events):
    """The message that a client makes of a stream's events."""
    assert events[0]["type"] == "message_start"
    message = events[0]["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    opened = None
    for event in events[1:]:
        kind, delta = event["type"], event.get("delta", {})
        if kind == "content_block_start":
            assert (opened, event["index"]) == (None, len(message["content"]))
            opened, text = event["content_block"], ""
            message["content"].append(opened)
        elif kind == "content_block_delta":
            assert event["index"] == len(message["content"]) - 1
            name = {"input_json_delta": "partial_json"}.get(delta["type"])
            if name:
                text += delta[name]
                opened["input"] = json.loads(text) if text.endswith("}") else None
            else:
                opened[delta["type"].removesuffix("_delta")] += delta[
                    delta["type"].removesuffix("_delta")
                ]
        elif kind == "content_block_stop":
            assert event["index"] == len(message["content"]) - 1
            opened = None
        elif kind == "message_delta":
            assert opened is None
            message |= delta
            message["usage"] |= event["usage"]
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    return message


def prompt(server):
    """The last request's prompt as text."""
    tokens = server.engine.requests[-1].prompt_tokens
    return server.serving.tokenizer.decode(tokens, skip_special_tokens=False)


@in_loop
async def test_a_message():
    async with serving("Hello, world!") as server:
        found = await ask(server)
        (request,) = server.engine.requests
    assert found.pop("id").startswith("msg_")
    assert found == {
        "type": "message",
        "role": "assistant",
        "model": "demo",
        "content": [{"type": "text", "text": "Hello, world!", "citations": None}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(request.prompt_tokens),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": len(tokenizer().encode("Hello, world!")) + 1,
        },
    }


ANSWERS = {
    "text": ("Hé 🏔!", {}),
    "nothing": ("", {}),
    "call": (call("now", '{"a": [1, "é"]}'), {"tools": [TOOL]}),
    "text and calls": (
        "A\n" + call("now", "{}") + "\n" + call("now", '{"a": 1}') + "\nB",
        {"tools": [TOOL]},
    ),
    "no tools": (call("now", "{}"), {}),
    "thoughts": ("Hm.\n</think>\n\nYes.\n" + call("now", "{}"), {"tools": [TOOL]}),
}


@pytest.mark.parametrize("name", ANSWERS)
@in_loop
async def test_a_stream_makes_the_same_message(name):
    script, fields = ANSWERS[name]
    template = THINKING if name == "thoughts" else TEMPLATE
    async with serving(script, template=template) as server:
        whole, events = await ask(server, **fields), await stream(server, **fields)
    streamed = rebuilt(events)
    for message in (whole, streamed):
        del message["id"]
        for block in message["content"]:
            block.pop("id", None)
    assert streamed == whole


@in_loop
async def test_a_streams_events_come_in_order():
    script = "Hm.\n</think>\n\nYes.\n" + call("now", '{"a": 1}')
    async with serving(script, template=THINKING) as server:
        events = await stream(server, tools=[TOOL])
    kinds = [
        event.get("delta", {}).get("type") or event.get("content_block", {}).get("type")
        for event in events
        if event["type"].startswith("content_block")
    ]
    order = [kind for kind, before in zip(kinds, [0, *kinds], strict=False) if kind != before]
    assert order == [
        *("thinking", "thinking_delta", "signature_delta", None),
        *("text", "text_delta", None),
        *("tool_use", "input_json_delta", None),
    ]
    assert [events[0]["type"], events[1]["type"]] == ["message_start", "ping"]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


@in_loop
async def test_blocks_are_thoughts_then_text_and_calls_in_their_order():
    script = "Hm.\n</think>\n\nYes.\n" + call("now", '{"a": 1}') + "\nB"
    async with serving(script, template=THINKING) as server:
        found = await ask(server, tools=[TOOL])
    thoughts, text, use, more = found["content"]
    assert (thoughts["type"], thoughts["thinking"]) == ("thinking", "Hm.")
    assert thoughts["signature"]
    assert (text["text"], more["text"]) == ("Yes.", "\nB")
    assert use.pop("id").startswith("call_")
    assert use == {"type": "tool_use", "name": "now", "input": {"a": 1}}
    assert found["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 2}, ("max_tokens", None)),
        ({"max_tokens": 5000}, ("end_turn", None)),
        ({"stop_sequences": ["x", "world"]}, ("stop_sequence", "world")),
    ],
)
@in_loop
async def test_why_an_answer_ended(fields, expected):
    async with serving("Hello, world!") as server:
        found, events = await ask(server, **fields), await stream(server, **fields)
    assert (found["stop_reason"], found["stop_sequence"]) == expected
    assert events[-2]["delta"] == {"stop_reason": expected[0], "stop_sequence": expected[1]}


@in_loop
async def test_an_answer_that_fills_the_context_says_so():
    async with serving("a " * MAX_MODEL_LEN) as server:
        found = await ask(server, max_tokens=5000)
    assert found["stop_reason"] == "model_context_window_exceeded"


@in_loop
async def test_arguments_that_broke_off_are_read_as_far_as_they_go():
    script = call("now", '{"a": [1, 2], "b": "wor')[: -len("}\n</tool_call>")]
    async with serving(script, template=TEMPLATE) as server:
        found = await ask(server, tools=[TOOL], max_tokens=500)
    assert found["content"][0]["input"] == {"a": [1, 2], "b": "wor"}


@in_loop
async def test_arguments_that_no_client_could_read_come_as_text():
    async with serving(call("now", '{"a": 1e999}'), template=TEMPLATE) as server:
        found = await ask(server, tools=[TOOL])
    assert found["content"][0]["input"] == {"text": '{"a": 1e999}'}


@pytest.mark.parametrize("text", ['{"a": ' + "1" * 5000 + "}", '{"a": ' + "[" * 300])
def test_so_do_arguments_without_bounds(text):
    assert Block("call", 0, text).arguments == {"text": text}


@in_loop
async def test_a_conversation_reaches_the_template():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "user", "content": "there"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "text", "text": "A"},
                {"type": "tool_use", "id": "c1", "name": "now", "input": {"é": 1}},
                {"type": "text", "text": "B"},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": "12:00"},
                {
                    "type": "tool_result",
                    "tool_use_id": "c2",
                    "is_error": True,
                    "content": [{"type": "text", "text": "late"}],
                },
                {"type": "text", "text": "So?", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]
    async with serving(template=TEMPLATE) as server:
        system = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]
        await ask(server, messages=messages, system=system, tools=[TOOL])
        found = prompt(server)
    tools, rest = found.split("\n", 1)
    function = {"name": "now", "description": "The time.", "parameters": {"type": "object"}}
    assert json.loads(tools.removeprefix("tools:")) == [{"type": "function", "function": function}]
    assert rest == (
        "<|im_start|>system\nBe\nbrief.<|im_end|>\n"
        "<|im_start|>user\nHi\nthere<|im_end|>\n"
        '<|im_start|>assistant\n(Hm.)AB\n{"name": "now", "arguments": {"é": 1}}<|im_end|>\n'
        "<|im_start|>tool\n12:00<|im_end|>\n"
        "<|im_start|>tool\nError: late<|im_end|>\n"
        "<|im_start|>user\nSo?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@in_loop
async def test_an_answer_goes_on_with_the_assistants_last_message():
    messages = [*BODY["messages"], {"role": "assistant", "content": "It is ("}]
    async with serving(template=TEMPLATE) as server:
        await ask(server, messages=messages)
        assert prompt(server).endswith("<|im_start|>assistant\nIt is (")


@in_loop
async def test_fields_reach_the_sampler():
    fields = {
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 7,
        "stop_sequences": ["END"],
        "seed": 5,
        "metadata": {"user_id": "x"},
        "service_tier": "auto",
    }
    async with serving() as server:
        await ask(server, **fields)
        sampling = server.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.75, 7)
    assert (sampling.stop, sampling.seed, sampling.max_new_tokens) == (("END",), 5, 200)


@in_loop
async def test_further_fields_reach_the_engine():
    async with serving() as server:
        await ask(server, min_p=0.25, repetition_penalty=1.5, cache_salt="s", temperature=1)
        (request,) = server.engine.requests
    assert (request.sampling.min_p, request.sampling.repetition_penalty) == (0.25, 1.5)
    assert request.cache_salt == "s"


@in_loop
async def test_a_form_that_the_answer_cannot_be_held_to_is_refused():
    form = {"type": "json_schema", "schema": {"not": {}}}
    async with serving() as server:
        response = await server.client.post(PATH, json=BODY | {"output_config": {"format": form}})
    assert (response.status_code, "output_config.format cannot be" in response.text) == (400, True)


@in_loop
async def test_tools_are_left_out_where_none_may_be_called():
    async with serving(call("now", "{}"), template=TEMPLATE) as server:
        found = await ask(server, tools=[TOOL], tool_choice={"type": "none"})
        assert "tools:" not in prompt(server)
    assert found["content"][0]["text"] == call("now", "{}")


@in_loop
async def test_one_call_at_most_where_parallel_ones_are_not_wanted():
    for disabled, uses in ((True, 1), (False, 2)):
        choice = {"type": "auto", "disable_parallel_tool_use": disabled}
        async with serving(call("now", "{}") * 2, template=TEMPLATE) as server:
            found = await ask(server, tools=[TOOL], tool_choice=choice)
        assert sum(one["type"] == "tool_use" for one in found["content"]) == uses


@in_loop
async def test_thinking_is_switched_where_the_model_has_a_switch():
    async with serving("Yes.", template=THINKING) as server:
        await ask(server, thinking={"type": "disabled"})
        assert prompt(server).endswith("</think>")
        await ask(server, thinking={"type": "enabled", "budget_tokens": 1024})
        assert prompt(server).endswith("<think>\n")
    async with serving("Yes.", template=TEMPLATE) as server:
        await ask(server, thinking={"type": "disabled"})
        response = await server.client.post(PATH, json=BODY | {"thinking": {"type": "adaptive"}})
        assert (response.status_code, "does not think" in response.text) == (400, True)


@in_loop
async def test_count_tokens_counts_the_prompt_however_long():
    async with serving(template=TEMPLATE) as server:
        await ask(server, tools=[TOOL], system="S")
        body = {"model": "demo", "messages": BODY["messages"], "tools": [TOOL], "system": "S"}
        response = await server.client.post(f"{PATH}/count_tokens", json=body)
        assert response.json() == {"input_tokens": len(server.engine.requests[0].prompt_tokens)}
        body["messages"] = [{"role": "user", "content": "a " * 2 * MAX_MODEL_LEN}]
        response = await server.client.post(f"{PATH}/count_tokens", json=body)
        assert response.json()["input_tokens"] > MAX_MODEL_LEN


@in_loop
async def test_cached_tokens_are_said_where_the_server_is_asked_to():
    engine = ScriptedEngine("Hello!")
    engine.cached_tokens = 3
    async with serving(engine, enable_prompt_tokens_details=True) as server:
        usage = (await ask(server))["usage"]
        length = len(engine.requests[0].prompt_tokens)
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (length - 3, 3)


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x"}}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "document"),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": ""}]}]},
            "thinking",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}],
                    }
                ]
            },
            "tool_use",
        ),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tools"),
        ({"container": "x"}, "container"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"context_management": {}}, "context_management"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"temperature": -1}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"n": 2}, "n is not supported"),
        ({"messages": [{"role": "user", "content": "a " * MAX_MODEL_LEN}]}, "context length"),
    ],
)
@in_loop
async def test_what_cannot_be_done_is_refused_by_name_in_anthropics_shape(fields, named):
    async with serving(template=TEMPLATE) as server:
        body = {key: value for key, value in (BODY | fields).items() if value is not None}
        response = await server.client.post(PATH, json=body)
        assert not server.engine.requests
    found = response.json()
    assert (response.status_code, found["type"]) == (400, "error")
    assert found["error"]["type"] == "invalid_request_error"
    assert named in found["error"]["message"]


@in_loop
async def test_a_thread_is_refused_so_that_clients_go_on_without_it():
    async with serving() as server:
        response = await server.client.post(PATH, json=BODY | {"thread": {"type": "create"}})
    assert response.status_code == 400
    assert response.json()["error"]["details"] == {"error_code": "thread_unsupported_request"}


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "now"}])
@in_loop
async def test_a_call_that_must_come_is_enforced(choice):
    async with serving(call("now", "{}"), template=TEMPLATE) as server:
        found = await ask(server, tools=[TOOL], tool_choice=choice)
        assert "now" in server.engine.requests[0].sampling.grammar
    assert found["stop_reason"] == "tool_use"


@in_loop
async def test_another_model_is_not_found():
    async with serving() as server:
        response = await server.client.post(PATH, json=BODY | {"model": "other"})
    assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")


@in_loop
async def test_an_error_in_mid_stream_is_an_event():
    engine = ScriptedEngine("Hello, world!")
    engine.failure = RuntimeError("defect")
    async with serving(engine) as server:
        response = await server.client.post(PATH, json=BODY | {"stream": True})
    last = response.text.removesuffix("\n\n").split("\n\n")[-1]
    name, data = last.split("\n")
    assert name == "event: error"
    error = json.loads(data.removeprefix("data: "))["error"]
    assert error["type"] == "api_error"
    assert "defect" not in error["message"]


@in_loop
async def test_a_stream_that_has_nothing_new_pings_and_ends_with_its_client():
    engine = ScriptedEngine("Hello, world!")
    engine.go.clear()
    async with serving(engine, stream_keep_alive=0.01) as server:
        call = server.call(PATH, BODY | {"stream": True})
        assert (await call.next())["status"] == 200
        first = (await call.next())["body"]  # Readers expect the message's beginning before all.
        assert first.startswith(b"event: message_start\n")
        assert (await call.next())["body"] == b'event: ping\ndata: {"type":"ping"}\n\n'
        await call.leave()
        engine.go.set()
        for _ in range(1000):
            if engine.cancelled:
                break
            await asyncio.sleep(0.01)
        assert engine.cancelled == [0]
