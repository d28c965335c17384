# SPDX-License-Identifier: Apache-2.0
"""Chat completions: the shapes that OpenAI's clients parse, and what a field asks of the engine."""

import asyncio
import json

import pytest

from meshwen.server.chat_models import ChatMessage, ChatRequest
from openai_streams import choices, chunks, events, without_id
from serving import EOS, ScriptedEngine, in_loop, serving, tokenizer

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
# Characters of several tokens, and the beginning of a stop string at the end.
TEXT = "é 👩‍👧 日本 STO then STO"
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"b": {}, "a": {}}},
    },
}
CALLS = (
    'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {"b": "é"}}\n</tool_call>'
)
# As Qwen2.5's template does, it writes arguments by `tojson`, so they must be objects.
TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}T{{ tool | tojson }}{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for call in m.tool_calls or [] %}C{{ call.function.arguments | tojson }}{% endfor %};"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}{{ flavour }}{{ documents }}"
)


def body(**fields):
    return {"model": "demo", "messages": HI, **fields}


async def ask(server, **fields):
    response = await server.client.post(PATH, json=body(**fields))
    assert response.status_code == 200, response.text
    return response.json()


async def stream(server, **fields):
    response = await server.client.post(PATH, json=body(stream=True, **fields))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].split(";")[0] == "text/event-stream"
    return chunks(response.text)


async def refused(server, status=400, **fields):
    response = await server.client.post(PATH, json=body(**fields))
    assert response.status_code == status, response.text
    return response.json()["error"]


def message_of(found, index=0):
    """A choice's message from the chunks of a stream, put together as clients do."""
    message = {"content": "", "reasoning_content": "", "tool_calls": []}
    for one in choices(found, index):
        delta = one["delta"]
        message["content"] += delta.get("content") or ""
        message["reasoning_content"] += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls", []):
            if call["index"] == len(message["tool_calls"]):
                message["tool_calls"].append({k: v for k, v in call.items() if k != "index"})
            else:
                arguments = call["function"]["arguments"]
                message["tool_calls"][call["index"]]["function"]["arguments"] += arguments
    return message


@in_loop
async def test_a_response_has_the_shape_that_openai_gives_it():
    async with serving("Hello!") as server:
        found = await ask(server)
    assert found.pop("id").startswith("chatcmpl-")
    assert isinstance(found.pop("created"), int)
    prompt = len(tokenizer().encode_chat(HI))
    answer = len(tokenizer().encode("Hello!")) + 1
    assert found == {
        "object": "chat.completion",
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello!", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
        },
        "system_fingerprint": "fp_test",
    }


@in_loop
async def test_a_stream_is_role_deltas_finish_usage_and_done():
    async with serving(TEXT) as server:
        found = await stream(server, n=2, stream_options={"include_usage": True})
    *parts, usage = found
    assert {chunk["id"] for chunk in found} == {found[0]["id"]}
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in found)
    assert all(chunk["system_fingerprint"] == "fp_test" for chunk in found)
    assert all(chunk["usage"] is None for chunk in parts)
    assert usage["choices"] == []
    answer = 2 * (len(tokenizer().encode(TEXT)) + 1)
    prompt = len(tokenizer().encode_chat(HI))
    assert usage["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
    }
    for index in (0, 1):
        first, *middle, last = choices(parts, index)
        assert first["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert last["delta"] == {}
        assert last["finish_reason"] == "stop"
        assert all(set(one["delta"]) == {"content"} for one in middle)
        assert all(one["finish_reason"] is None for one in (first, *middle))
        assert "".join(one["delta"]["content"] for one in middle) == TEXT


@in_loop
async def test_usage_comes_only_where_it_is_asked_for_and_in_each_chunk_where_that_is():
    async with serving("Hello!") as server:
        assert not any("usage" in chunk for chunk in await stream(server))
        options = {"include_usage": True, "continuous_usage_stats": True}
        found = await stream(server, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in found]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == len(tokenizer().encode("Hello!")) + 1


@pytest.mark.parametrize("stop", [None, ["STOP"], ["then"], ["日"]])
@in_loop
async def test_streamed_and_whole_answers_are_the_same_and_no_logprob_is_lost(stop):
    fields = {"logprobs": True, "top_logprobs": 2, "stop": stop, "return_token_ids": True}
    async with serving(TEXT) as server:
        whole = await ask(server, **fields)
        found = await stream(server, **fields)
    (choice,), parts = whole["choices"], choices(found, 0)
    assert message_of(found)["content"] == choice["message"]["content"]
    listed = [one for part in parts for one in (part["logprobs"] or {"content": []})["content"]]
    assert listed == choice["logprobs"]["content"]
    assert [i for part in parts for i in part.get("token_ids", [])] == choice["token_ids"]
    assert len(listed) == len(choice["token_ids"]) == whole["usage"]["completion_tokens"]
    assert found[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert parts[-1]["stop_reason"] == choice["stop_reason"]
    if stop is None:
        data = bytes(byte for one in listed for byte in one["bytes"])
        assert data.decode() == choice["message"]["content"] == TEXT


@in_loop
async def test_logprobs_have_token_logprob_bytes_and_the_likeliest():
    async with serving("H") as server:
        (choice,) = (await ask(server, logprobs=True, top_logprobs=2))["choices"]
        (plain,) = (await ask(server, logprobs=True))["choices"]
    (h,) = tokenizer().encode("H")
    assert choice["logprobs"] == {
        "content": [
            {
                "token": "H",
                "logprob": -(1 + h % 7) / 8,
                "bytes": [72],
                "top_logprobs": [
                    {"token": "H", "logprob": -1 / 16, "bytes": [72]},
                    {"token": "I", "logprob": -2 / 16, "bytes": [73]},
                ],
            },
            {
                "token": "<|im_end|>",
                "logprob": -(1 + EOS % 7) / 8,
                "bytes": [],
                "top_logprobs": [
                    {"token": "<|im_end|>", "logprob": -1 / 16, "bytes": []},
                    {"token": "", "logprob": -2 / 16, "bytes": []},
                ],
            },
        ],
        "refusal": None,
    }
    assert [one["top_logprobs"] for one in plain["logprobs"]["content"]] == [[], []]


@in_loop
async def test_prompt_logprobs_have_vllms_shape():
    async with serving("H") as server:
        found = await ask(server, prompt_logprobs=1, return_token_ids=True)
    ids = found["prompt_token_ids"]
    first, *others = found["prompt_logprobs"]
    assert first is None
    assert [list(one) for one in others] == [[str(token)] for token in ids[1:]]
    assert others[0][str(ids[1])] == {
        "logprob": -1 / 16,
        "rank": 1,
        "decoded_token": tokenizer().decode([ids[1]], skip_special_tokens=False),
    }


@in_loop
async def test_sampling_fields_reach_the_engine():
    async with serving("H", {"repetition_penalty": 1.25, "do_sample": True}) as server:
        await ask(
            server,
            temperature=0.5,
            top_p=0.25,
            top_k=-1,
            min_p=0.125,
            presence_penalty=1,
            frequency_penalty=-1.5,
            seed=-1,
            n=3,
            stop="x",
            stop_token_ids=[7],
            ignore_eos=True,
            min_tokens=2,
            max_completion_tokens=9,
            logit_bias={"5": -100},
            logprobs=True,
            top_logprobs=4,
            cache_salt="me",
        )
        (request,) = server.engine.requests
    asked = request.sampling
    assert (asked.temperature, asked.top_p, asked.top_k, asked.min_p) == (0.5, 0.25, 0, 0.125)
    assert (asked.presence_penalty, asked.frequency_penalty) == (1, -1.5)
    assert asked.repetition_penalty == 1.25
    assert (asked.seed, asked.n) == ((1 << 32) - 1, 3)
    assert (asked.stop, asked.stop_token_ids, asked.ignore_eos) == (("x",), (7,), True)
    assert (asked.min_new_tokens, asked.max_new_tokens) == (2, 9)
    assert asked.logit_bias == ((5, -100.0),)
    assert (asked.logprobs, asked.top_logprobs, asked.prompt_logprobs) == (True, 4, False)
    assert request.cache_salt == "me"


@in_loop
async def test_without_a_limit_an_answer_goes_up_to_the_context_and_without_a_seed_it_has_one():
    async with serving("H", {"do_sample": True}) as server:
        await ask(server)
        await ask(server)
        first, second = (one.sampling for one in server.engine.requests)
    assert first.max_new_tokens == server.serving.max_model_len
    assert not first.max_new_tokens_asked
    assert first.temperature == 1  # The checkpoint's, not OpenAI's.
    assert first.seed != second.seed


@in_loop
async def test_the_same_request_gets_the_same_bytes_but_for_id_and_time():
    async with serving(TEXT) as server:
        server.engine.cached_tokens = 3
        first = await ask(server, logprobs=True)
        server.engine.cached_tokens = 0
        second = await ask(server, logprobs=True)
    assert json.dumps(without_id(first)) == json.dumps(without_id(second))
    assert first["id"] != second["id"]


@in_loop
async def test_cached_tokens_are_told_where_the_server_is_to():
    async with serving("H", enable_prompt_tokens_details=True) as server:
        server.engine.cached_tokens = 3
        found = await ask(server, n=2)
        *_, last = await stream(server, stream_options={"include_usage": True})
    assert found["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


@in_loop
async def test_text_parts_are_joined_and_developers_speak_as_the_system():
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]},
    ]
    async with serving("H") as server:
        await ask(server, messages=messages)
        (request,) = server.engine.requests
    expected = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}]
    assert list(request.prompt_tokens) == tokenizer().encode_chat(expected)


@in_loop
async def test_calls_and_their_results_reach_the_template_as_objects_and_tools_as_written():
    messages = [
        *HI,
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "add", "arguments": '{"a": [1, "é"]}'},
                },
                {"id": "2", "type": "function", "function": {"name": "add", "arguments": ""}},
            ],
        },
        {"role": "tool", "content": "2", "tool_call_id": "call_1"},
    ]
    async with serving("H", template=TOOL_TEMPLATE) as server:
        variables = {"chat_template_kwargs": {"flavour": "mint"}, "documents": [{"a": 1}]}
        await ask(server, messages=messages, tools=[TOOL], **variables)
        await ask(server, messages=messages, tools=[TOOL], tool_choice="none")
        with_tools, without = (
            tokenizer().decode(one.prompt_tokens) for one in server.engine.requests
        )
    history = 'user:Hi;assistant:C{"a": [1, "é"]}C{};tool:2;A:'
    assert with_tools == f"T{json.dumps(TOOL)}{history}mint[{{'a': 1}}]"
    assert without == history + "None"


@in_loop
async def test_arguments_in_the_history_that_are_no_object_are_refused_by_their_place():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "[1"}}
    messages = [*HI, {"role": "assistant", "tool_calls": [call]}]
    async with serving("H") as server:
        error = await refused(server, messages=messages)
        assert error["param"] == "messages[1].tool_calls[0].function.arguments"
        call["function"]["arguments"] = "[1]"
        error = await refused(server, messages=messages)
        assert error["param"] == "messages[1].tool_calls[0].function.arguments"


@in_loop
async def test_tool_calls_are_the_same_streamed_and_whole():
    async with serving(CALLS, template=TOOL_TEMPLATE) as server:
        whole = await ask(server, tools=[TOOL])
        found = await stream(server, tools=[TOOL])
        alone = await ask(server, tools=[TOOL], parallel_tool_calls=False)
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == choices(found, 0)[-1]["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    calls = choice["message"]["tool_calls"]
    assert [json.loads(one["function"]["arguments"]) for one in calls] == [{"a": 1}, {"b": "é"}]
    assert all(one["type"] == "function" and one["id"].startswith("call_") for one in calls)
    streamed = message_of(found)
    assert streamed["content"] == "Let me see."
    assert [one["function"] for one in streamed["tool_calls"]] == [one["function"] for one in calls]
    assert len(alone["choices"][0]["message"]["tool_calls"]) == 1


@in_loop
async def test_the_tokens_of_calls_are_listed_once_each():
    fields = {"tools": [TOOL], "logprobs": True, "return_token_ids": True}
    async with serving(CALLS, template=TOOL_TEMPLATE) as server:
        (choice,) = (await ask(server, **fields))["choices"]
        parts = choices(await stream(server, **fields), 0)
    listed = [one for part in parts for one in (part["logprobs"] or {"content": []})["content"]]
    assert listed == choice["logprobs"]["content"]
    tokens = [token for part in parts for token in part.get("token_ids", [])]
    assert tokens == choice["token_ids"] == [*tokenizer().encode(CALLS), EOS]


@in_loop
async def test_what_only_began_like_a_call_is_content_in_the_end():
    async with serving("Well <tool_ca", template=TOOL_TEMPLATE) as server:
        (choice,) = (await ask(server, tools=[TOOL]))["choices"]
        found = await stream(server, tools=[TOOL])
    assert choice["message"]["content"] == message_of(found)["content"] == "Well <tool_ca"
    assert choice["finish_reason"] == "stop"


@in_loop
async def test_an_answer_of_calls_alone_has_no_content():
    async with serving(CALLS.split("\n", 1)[1], template=TOOL_TEMPLATE) as server:
        (choice,) = (await ask(server, tools=[TOOL]))["choices"]
    assert choice["message"]["content"] is None


@pytest.mark.parametrize("wanted", [True, False])
@in_loop
async def test_reasoning_comes_apart_streamed_and_whole(wanted):
    async with serving("<think>\nWell\n</think>\n\nYes", reasoning_parser="think") as server:
        whole = await ask(server, include_reasoning=wanted)
        found = await stream(server, include_reasoning=wanted)
    message, streamed = whole["choices"][0]["message"], message_of(found)
    assert message["content"] == streamed["content"] == "Yes"
    expected = "Well" if wanted else ""
    assert message.get("reasoning_content", "").strip() == expected
    assert streamed["reasoning_content"].strip() == expected


HARMLESS = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "prediction": {"type": "content", "content": "x"},
    "modalities": ["text"],
    "echo": False,
    "priority": 0,
    "tools": [],
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "skip_special_tokens": True,
    "length_penalty": 1.0,
    "bad_words": [],
}


@in_loop
async def test_what_changes_no_answer_is_taken_and_so_is_null_for_every_field():
    nothing = dict.fromkeys(ChatRequest.model_fields.keys() - {"messages", "stream"})
    async with serving("H") as server:
        plain = without_id(await ask(server))
        assert without_id(await ask(server, **HARMLESS)) == plain
        assert without_id(await ask(server, **nothing)) == plain


REFUSED = [
    ("no_such_field", 1),
    ("audio", {"voice": "x", "format": "wav"}),
    ("modalities", ["text", "audio"]),
    ("functions", [TOOL["function"]]),
    ("function_call", "auto"),
    ("reasoning_effort", "high"),
    ("chat_template", "x"),
    ("echo", True),
    ("allowed_token_ids", [1]),
    ("bad_words", ["x"]),
    ("truncate_prompt_tokens", 5),
    ("skip_special_tokens", False),
    ("use_beam_search", True),
    ("length_penalty", 2.0),
    ("priority", 1),
    ("web_search_options", {}),
    ("temperature", -1),
    ("temperature", "1"),
    ("top_p", 0),
    ("n", 0),
    ("n", 129),
    ("n", True),
    ("stop", ["x"] * 17),
    ("stop", ""),
    ("top_logprobs", 21),
    ("max_tokens", 0),
    ("min_tokens", -1),
    ("seed", 1 << 64),
    ("logit_bias", [1]),
    ("tools", [{"type": "custom", "custom": {"name": "x"}}]),
    ("tool_choice", "sometimes"),
    ("cache_salt", ""),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
@in_loop
async def test_a_field_that_cannot_be_as_asked_is_refused_by_name(name, value):
    async with serving("H") as server:
        error = await refused(server, **{name: value})
        assert error["type"] == "invalid_request_error"
        assert error["param"].startswith(name)
        assert name in error["message"]
        assert not server.engine.requests


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"stream_options": {"include_usage": True}}, "stream"),
        ({"top_logprobs": 1}, "logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"stream": True, "prompt_logprobs": 0}, "prompt_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"tools": [1]}}, "tools"),
        ({"chat_template_kwargs": {"messages": [1]}}, "messages"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1024": 1}}, "logit_bias"),
        ({"stop_token_ids": [1024]}, "stop_token_ids"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "x"),
    ],
)
@in_loop
async def test_fields_that_do_not_go_together_are_refused(fields, word):
    async with serving("H") as server:
        assert word in (await refused(server, **fields))["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}},
        ),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "xml"}),
        ("structured_outputs", {"regex": "("}),
        ("structured_outputs", {"regex": "a+", "choice": ["a"]}),
        ("structured_outputs", {}),
    ],
)
@in_loop
async def test_a_form_that_the_answer_cannot_be_held_to_is_refused(name, value):
    async with serving("H") as server:
        assert (await refused(server, **{name: value}))["param"].startswith(name)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages[0]"),
        ({"role": "function", "content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 3}, "messages[0].content"),
        ({"role": "user", "content": "x", "tool_calls": []}, None),
        ({"role": "assistant"}, "messages[0]"),
        ({"role": "assistant", "content": "x", "audio": {"id": "1"}}, "messages[0].audio"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0]",
        ),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
            "messages[0].content[0]",
        ),
        ({"role": "user", "content": [{"type": "file", "file": {}}]}, "messages[0].content[0]"),
    ],
)
@in_loop
async def test_a_message_that_cannot_be_read_is_refused_by_its_place(message, param):
    async with serving("H") as server:
        if param is None:
            await ask(server, messages=[message])
        else:
            assert (await refused(server, messages=[message]))["param"] == param


@pytest.mark.parametrize("streamed", [False, True])
@in_loop
async def test_a_prompt_that_is_too_long_is_refused_in_the_words_that_clients_look_for(streamed):
    messages = [{"role": "user", "content": "a b " * 2000}]
    async with serving("H") as server:
        error = await refused(server, messages=messages, stream=streamed)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "messages"
    assert "maximum context length is 1024 tokens. However, your messages" in error["message"]


@in_loop
async def test_another_model_is_not_found():
    async with serving("H", served_model_name=("a", "b")) as server:
        assert (await ask(server, model="b"))["model"] == "a"
        error = await refused(server, 404, model="c")
    assert (error["param"], error["code"]) == ("model", "model_not_found")


@in_loop
async def test_the_last_message_is_continued():
    messages = [*HI, {"role": "assistant", "content": "I am"}]
    async with serving("H") as server:
        await ask(server, messages=messages, continue_final_message=True)
        (request,) = server.engine.requests
    assert tokenizer().decode(request.prompt_tokens).endswith("I am")


@in_loop
async def test_an_engine_that_fails_within_a_stream_is_an_error_event():
    async with serving("Hello!") as server:
        server.engine.go.clear()
        call = server.call(PATH, body(stream=True))
        assert (await call.next())["status"] == 200  # Before the first token.
        server.engine.failure = RuntimeError("broken")
        server.engine.go.set()
        *_, error, done = events((await call.rest()).decode())
    assert done == "[DONE]"
    assert json.loads(error)["error"]["type"] == "server_error"
    assert "broken" not in error


@in_loop
async def test_a_stream_without_news_sends_comments():
    async with serving("Hello!", stream_keep_alive=0.01) as server:
        server.engine.go.clear()
        call = server.call(PATH, body(stream=True))
        await call.next()
        assert (await call.next())["body"].startswith(b":")
        assert (await call.next())["body"].startswith(b":")
        server.engine.go.set()
        found = chunks((await call.rest()).decode())
    assert message_of(found)["content"] == "Hello!"


@pytest.mark.parametrize("streamed", [False, True])
@in_loop
async def test_a_client_that_goes_away_frees_its_place_in_the_engine(streamed):
    async with serving(ScriptedEngine("a b c d e f g h" * 40)) as server:
        server.engine.pause = 0.005
        call = server.call(PATH, body(stream=streamed))
        if streamed:
            await call.next()
            await call.next()
        else:
            while not server.engine.steps:
                await in_a_moment()
        await call.leave()
        while not server.engine.cancelled:
            await in_a_moment()
    assert server.engine.cancelled == [0]


async def in_a_moment():
    await asyncio.sleep(0.002)


@in_loop
async def test_a_full_queue_is_a_plain_503_to_who_would_stream():
    async with serving(ScriptedEngine("Hello!", slots=1), max_queue=0) as server:
        server.engine.go.clear()
        call = server.call(PATH, body(stream=True))
        await call.next()
        response = await server.client.post(PATH, json=body(stream=True))
        server.engine.go.set()
        await call.rest()
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "queue_full"
    assert "retry-after" in response.headers


def test_what_a_client_sends_back_of_an_answer_is_taken():
    # A message as the `openai` package dumps it.
    dumped = {
        "role": "assistant",
        "content": "Hi",
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": None,
        "reasoning_content": "Well",
    }
    expected = {"role": "assistant", "content": "Hi", "reasoning_content": "Well"}
    assert ChatMessage.model_validate(dumped).for_template("messages[0]") == expected
    del dumped["reasoning_content"]
    other = ChatMessage.model_validate(dumped | {"reasoning": "Well"})
    assert other.for_template("messages[0]") == expected
