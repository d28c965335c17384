# SPDX-License-Identifier: Apache-2.0
"""OpenAI's responses: what is asked of the model, and responses whole and streamed."""

import json
from itertools import count

import pytest

from answer_texts import TEMPLATE, THINKING, call
from serving import MAX_MODEL_LEN, ScriptedEngine, in_loop, logprob, serving, tokenizer

PATH = "/v1/responses"
TOOL = {
    "type": "function",
    "name": "now",
    "description": "The time.",
    "parameters": {"type": "object"},
    "strict": False,
}


async def ask(server, **fields):
    response = await server.client.post(PATH, json={"model": "demo", "input": "Hi"} | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def stream(server, **fields):
    """The events of a stream."""
    body = {"model": "demo", "input": "Hi", "stream": True} | fields
    response = await server.client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


def events_of(text):
    found = []
    for number, event in zip(count(), text.removesuffix("\n\n").split("\n\n"), strict=False):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
        assert found[-1]["sequence_number"] == number
    return found


def without_ids(response):
    """A response without what differs from one to the next."""
    response = {k: v for k, v in response.items() if k not in ("id", "created_at", "completed_at")}
    output = [{k: v for k, v in one.items() if not k.endswith("id")} for one in response["output"]]
    return response | {"output": output}


def prompt(server):
    """The last request's prompt as text."""
    tokens = server.engine.requests[-1].prompt_tokens
    return server.serving.tokenizer.decode(tokens, skip_special_tokens=False)


@in_loop
async def test_a_response():
    async with serving("Hello, world!") as server:
        found = await ask(server, metadata={"a": "b"}, store=True, user="u")
        (request,) = server.engine.requests
    answer, asked = len(tokenizer().encode("Hello, world!")) + 1, len(request.prompt_tokens)
    assert found.pop("id").startswith("resp_")
    assert found["output"][0].pop("id").startswith("msg_")
    assert found.pop("created_at") <= found.pop("completed_at")
    assert found == {
        "object": "response",
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {"a": "b"},
        "model": "demo",
        "output": [
            {
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [
                    {
                        "type": "output_text",
                        "text": "Hello, world!",
                        "annotations": [],
                        "logprobs": [],
                    }
                ],
            }
        ],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "system_fingerprint": "fp_test",
        "temperature": 0.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": asked,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": answer,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": asked + answer,
        },
        "user": "u",
    }


THOUGHTS = "Hm.\n</think>\n\nYes.\n" + call("now", '{"a": 1}') + "\nB"


@pytest.mark.parametrize("fields", [{}, {"tools": [TOOL]}, {"max_output_tokens": 30}])
@pytest.mark.parametrize("script", ["Hé 🏔!", "", THOUGHTS])
@in_loop
async def test_a_stream_ends_with_the_same_response_and_its_events_make_it(script, fields):
    async with serving(script, template=THINKING) as server:
        whole, events = await ask(server, **fields), await stream(server, **fields)
    last = events[-1]
    assert last["type"] == f"response.{whole['status']}"
    assert without_ids(last["response"]) == without_ids(whole)
    items = {}
    for event in events:
        kind = event["type"].removeprefix("response.")
        if "item_id" in event:
            assert event["item_id"] == items[event["output_index"]][0]["id"]
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items[event["output_index"]] = (event["item"], [])
        elif kind.endswith(".delta"):
            items[event["output_index"]][1].append(event["delta"])
        elif kind.endswith("text.done"):
            assert event["text"] == "".join(items[event["output_index"]][1])
        elif kind.endswith("arguments.done"):
            assert event["arguments"] == "".join(items[event["output_index"]][1])
        elif kind == "content_part.done":
            assert event["part"]["text"] == "".join(items[event["output_index"]][1])
        elif kind == "output_item.done":
            assert event["item"] == last["response"]["output"][event["output_index"]]
    assert len(items) == len(last["response"]["output"])


@in_loop
async def test_a_streams_events_come_in_order():
    async with serving(THOUGHTS, template=THINKING) as server:
        events = await stream(server, tools=[TOOL])
    kinds = [event["type"].removeprefix("response.") for event in events]
    order = [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]
    message = [
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
    ]
    assert order == [
        *("created", "in_progress"),
        *(one.replace("output_text", "reasoning_text") for one in message),
        *message,
        *("output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        *message,
        "completed",
    ]
    assert events[0]["response"]["status"] == "in_progress"
    added = [event["item"] for event in events if event["type"].endswith("item.added")]
    assert [one["status"] for one in added] == ["in_progress"] * 4
    assert added[1]["content"] == []
    assert added[2]["arguments"] == ""


@in_loop
async def test_items_are_thoughts_messages_and_calls():
    async with serving(THOUGHTS, template=THINKING) as server:
        found = await ask(server, tools=[TOOL])
    thoughts, text, use, more = found["output"]
    assert thoughts["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert (thoughts["type"], thoughts["summary"]) == ("reasoning", [])
    assert (text["content"][0]["text"], more["content"][0]["text"]) == ("Yes.", "\nB")
    assert use.pop("id").startswith("fc_")
    assert use.pop("call_id").startswith("call_")
    expected = {"type": "function_call", "name": "now", "arguments": '{"a": 1}'}
    assert use == expected | {"status": "completed"}
    assert found["tools"] == [TOOL]
    assert found["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


@in_loop
async def test_an_answer_that_ends_at_a_limit_is_incomplete():
    async with serving("Hello, world!") as server:
        found = await ask(server, max_output_tokens=2)
        events = await stream(server, max_output_tokens=2)
    assert (found["status"], found["completed_at"]) == ("incomplete", None)
    assert found["incomplete_details"] == {"reason": "max_output_tokens"}
    assert found["output"][0]["status"] == "incomplete"
    assert events[-1]["type"] == "response.incomplete"


@in_loop
async def test_log_probabilities_of_a_messages_tokens():
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    async with serving("Hé 🏔!", template=TEMPLATE) as server:
        found, events = await ask(server, **fields), await stream(server, **fields)
    (part,) = found["output"][0]["content"]
    tokens = tokenizer().encode("Hé 🏔!")
    assert [one["logprob"] for one in part["logprobs"]] == list(map(logprob, tokens))
    assert b"".join(bytes(one["bytes"]) for one in part["logprobs"]).decode() == "Hé 🏔!"
    assert {len(one["top_logprobs"]) for one in part["logprobs"]} == {2}
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [one for event in deltas for one in event["logprobs"]] == part["logprobs"]


@in_loop
async def test_log_probabilities_of_a_call_are_no_messages():
    async with serving(call("now", "{}") + "\nSo", template=TEMPLATE) as server:
        found = await ask(server, tools=[TOOL], include=["message.output_text.logprobs"])
    use, text = found["output"]
    assert "logprobs" not in use
    (part,) = text["content"]
    assert b"".join(bytes(one["bytes"]) for one in part["logprobs"]).decode() == part["text"]


@in_loop
async def test_a_conversation_reaches_the_template():
    items = [
        {"role": "user", "content": "Hi"},
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "D"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm."}],
            "encrypted_content": None,
            "status": "completed",
        },
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [
                {"type": "output_text", "text": "A", "annotations": [], "logprobs": []},
                {"type": "refusal", "refusal": "B"},
            ],
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "c1",
            "name": "now",
            "arguments": '{"é": 1}',
            "status": "completed",
        },
        {"type": "function_call", "call_id": "c2", "name": "now", "arguments": '{"b": "x'},
        {"type": "function_call_output", "call_id": "c1", "output": "12:00"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "late"}],
        },
        {"role": "assistant", "content": "C"},
        {"role": "assistant", "content": "D"},
    ]
    async with serving(template=TEMPLATE) as server:
        await ask(server, input=items, instructions="Be brief.", tools=[TOOL])
        found = prompt(server)
    tools, rest = found.split("\n", 1)
    function = {key: value for key, value in TOOL.items() if key != "type"}
    assert json.loads(tools.removeprefix("tools:")) == [{"type": "function", "function": function}]
    assert rest == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>system\nD<|im_end|>\n"
        '<|im_start|>assistant\n(Hm.)AB\n{"name": "now", "arguments": {"é": 1}}\n'
        '{"name": "now", "arguments": {"b": "x"}}<|im_end|>\n'
        "<|im_start|>tool\n12:00<|im_end|>\n"
        "<|im_start|>tool\nlate<|im_end|>\n"
        "<|im_start|>assistant\nC<|im_end|>\n"
        "<|im_start|>assistant\nD<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@in_loop
async def test_an_output_sent_back_makes_the_same_turn():
    async with serving(THOUGHTS, template=THINKING) as server:
        output = (await ask(server, tools=[TOOL]))["output"]
        items = [{"role": "user", "content": "Hi"}, *output]
        items.append(
            {"type": "function_call_output", "call_id": output[2]["call_id"], "output": "x"}
        )
        await ask(server, input=items, tools=[TOOL])
        turn = '(Hm.)Yes.\nB\n{"name": "now", "arguments": {"a": 1}}<|im_end|>\n'
        assert f"<|im_start|>assistant\n{turn}<|im_start|>tool\nx" in prompt(server)


@in_loop
async def test_fields_reach_the_sampler():
    fields = {
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 7,
        "max_output_tokens": 20,
        "seed": 5,
        "truncation": "disabled",
        "prompt_cache_key": "x",
    }
    async with serving() as server:
        found = await ask(server, **fields)
        sampling = server.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.75, 7)
    assert (sampling.seed, sampling.max_new_tokens) == (5, 20)
    assert (found["temperature"], found["top_p"], found["max_output_tokens"]) == (0.5, 0.75, 20)


@in_loop
async def test_further_fields_reach_the_engine():
    template = TEMPLATE + "{{ flavour }}"
    fields = {"min_p": 0.25, "repetition_penalty": 1.5, "cache_salt": "s", "temperature": 1}
    async with serving(template=template) as server:
        await ask(server, **fields, chat_template_kwargs={"flavour": "mint"})
        (request,) = server.engine.requests
        assert prompt(server).endswith("assistant\nmint")
    assert (request.sampling.min_p, request.sampling.repetition_penalty) == (0.25, 1.5)
    assert request.cache_salt == "s"


@in_loop
async def test_what_changes_no_answer_is_taken():
    fields = {
        "text": {"format": {"type": "text"}},
        "reasoning": {"summary": "auto", "mode": "standard"},
        "truncation": "disabled",
        "include": ["reasoning.encrypted_content"],
    }
    async with serving() as server:
        await ask(server, **fields)
        await stream(server, **fields, stream_options={"include_obfuscation": False})
        first, second = server.engine.requests
    assert first == second


@in_loop
async def test_a_form_that_the_answer_cannot_be_held_to_is_refused():
    form = {"type": "json_schema", "name": "x", "schema": {"not": {}}}
    body = {"input": "Hi", "text": {"format": form}}
    async with serving() as server:
        response = await server.client.post(PATH, json=body)
    assert (response.status_code, "text.format cannot be" in response.text) == (400, True)


@in_loop
async def test_tools_are_left_out_where_none_may_be_called():
    async with serving(call("now", "{}") * 2, template=TEMPLATE) as server:
        found = await ask(server, tools=[TOOL], tool_choice="none")
        assert "tools:" not in prompt(server)
        assert [one["type"] for one in found["output"]] == ["message"]
        found = await ask(server, tools=[TOOL], parallel_tool_calls=False)
        assert [one["type"] for one in found["output"]] == ["function_call", "message"]


@in_loop
async def test_cached_tokens_are_said_where_the_server_is_asked_to():
    engine = ScriptedEngine("Hello!")
    engine.cached_tokens = 3
    async with serving(engine, enable_prompt_tokens_details=True) as server:
        usage = (await ask(server))["usage"]
    assert usage["input_tokens_details"]["cached_tokens"] == 3


IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"input": None}, "input"),
        ({"input": [IMAGE]}, "input[0].content[0]"),
        ({"input": [IMAGE]}, "input_image"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"input": [{"type": "web_search_call"}]}, "web_search_call"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        (
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]},
            "encrypted_content",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "b", "arguments": "x"}]},
            "input",
        ),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"include": ["web_search_call.results"]}, "include[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"stop": ["x"]}, "stop is not supported"),
        ({"input": "a " * MAX_MODEL_LEN}, "context length"),
    ],
)
@in_loop
async def test_what_cannot_be_done_is_refused_by_name(fields, named):
    async with serving(template=TEMPLATE) as server:
        body = {"model": "demo", "input": "Hi"} | fields
        body = {key: value for key, value in body.items() if value is not None}
        response = await server.client.post(PATH, json=body)
        assert not server.engine.requests
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert named in error["message"]
    assert error["param"].split(".")[0].split("[")[0] in body or error["code"]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "name": "now"}, "auto", "none"]
)
@in_loop
async def test_a_call_that_must_come_is_enforced(choice):
    async with serving(call("now", "{}"), template=TEMPLATE) as server:
        await ask(server, tools=[TOOL], tool_choice=choice)
        grammar = server.engine.requests[0].sampling.grammar
    assert (grammar is not None) == (choice not in ("auto", "none"))
    assert grammar is None or "now" in grammar


@in_loop
async def test_another_model_is_not_found():
    async with serving() as server:
        response = await server.client.post(PATH, json={"model": "other", "input": "Hi"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


@in_loop
async def test_an_error_in_mid_stream_is_two_events():
    engine = ScriptedEngine("Hello, world!")
    engine.failure = RuntimeError("defect")
    async with serving(engine) as server:
        body = {"model": "demo", "input": "Hi", "stream": True}
        text = (await server.client.post(PATH, json=body)).text
    *_, error, failed = events_of(text)
    assert "defect" not in text
    assert (error["type"], failed["type"]) == ("error", "response.failed")
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": error["message"]}
