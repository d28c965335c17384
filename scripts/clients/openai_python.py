# SPDX-License-Identifier: Apache-2.0
"""OpenAI's client for Python."""

import json
from typing import Literal

import openai
from checks import (
    KEY,
    LIMIT,
    MESSAGES,
    MODEL,
    QUESTION,
    URL,
    WEATHER,
    check,
    expect,
    expect_solved,
    run_all,
)
from pydantic import BaseModel

OPTIONS = {"base_url": f"{URL}/v1", "api_key": KEY, "timeout": 120, "max_retries": 0}
ASKED = {"model": MODEL, "messages": MESSAGES, "max_tokens": LIMIT, "temperature": 0}
client = openai.OpenAI(**OPTIONS)
TOOL = {
    "type": "function",
    "function": {
        "name": WEATHER["name"],
        "description": WEATHER["description"],
        "parameters": WEATHER["schema"],
    },
}


class City(BaseModel):
    name: Literal["Paris", "Oslo"]
    is_capital: bool


def whole() -> str:
    return client.chat.completions.create(**ASKED).choices[0].message.content


@check
def lists_the_models() -> None:
    assert MODEL in [one.id for one in client.models.list()]
    expect(client.models.retrieve(MODEL).id, MODEL)


@check
def a_chat() -> None:
    found = client.chat.completions.create(**ASKED)
    expect_solved(found.choices[0].message.content)
    expect(found.choices[0].finish_reason, "stop")
    expect(found.usage.total_tokens, found.usage.prompt_tokens + found.usage.completion_tokens)
    assert found.system_fingerprint


@check
async def an_asynchronous_chat() -> None:
    async with openai.AsyncOpenAI(**OPTIONS) as other:
        found = await other.chat.completions.create(**ASKED)
        expect(found.choices[0].message.content, whole())
        stream = await other.chat.completions.create(**ASKED, stream=True)
        pieces = [one.choices[0].delta.content or "" async for one in stream]
        expect("".join(pieces), whole())


@check
def a_streamed_chat() -> None:
    text, reasons, usage = "", [], None
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in client.chat.completions.create(**ASKED, **asked):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] * (choice.finish_reason is not None)
    expect(text, whole())
    expect(reasons, ["stop"])
    assert usage.completion_tokens > 1


@check
def the_streaming_helper() -> None:
    with client.chat.completions.stream(**ASKED) as stream:
        kinds = {event.type for event in stream}
        expect(stream.get_final_completion().choices[0].message.content, whole())
    assert {"chunk", "content.delta", "content.done"} <= kinds


@check
def several_answers_with_log_probabilities() -> None:
    asked = ASKED | {"n": 2, "temperature": 0.8, "seed": 7, "logprobs": True, "top_logprobs": 3}
    first, again = (client.chat.completions.create(**asked) for _ in range(2))
    expect(
        [one.message.content for one in first.choices], [o.message.content for o in again.choices]
    )
    for choice in first.choices:
        tokens = choice.logprobs.content
        assert all(one.logprob <= 0 and len(one.top_logprobs) == 3 for one in tokens)
        written = b"".join(bytes(one.bytes) for one in tokens)
        expect(written.decode(), choice.message.content)


@check
def a_stop_string() -> None:
    text = whole()
    stop = text[len(text) // 2 :][:4]
    found = client.chat.completions.create(**ASKED, stop=[stop])
    expect(found.choices[0].message.content, text[: text.index(stop)])


@check
def a_completion() -> None:
    asked = {"model": MODEL, "prompt": QUESTION, "max_tokens": 16, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    streamed = client.completions.create(**asked, stream=True)
    expect("".join(one.choices[0].text for one in streamed), text)
    found = client.completions.create(**asked, echo=True, logprobs=2).choices[0]
    expect(found.text, QUESTION + text)
    expect(found.logprobs.token_logprobs[0], None)
    expect("".join(found.logprobs.tokens), found.text)


@check
def tools_that_need_not_be_called() -> None:
    message = client.chat.completions.create(**ASKED, tools=[TOOL]).choices[0].message
    assert message.content or message.tool_calls


@check
def a_tool_that_has_to_be_called() -> None:
    required = {"tools": [TOOL], "tool_choice": "required"}
    named = {
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
    }
    for asked in (required, named):
        (call,) = client.chat.completions.create(**ASKED, **asked).choices[0].message.tool_calls
        expect(call.function.name, "get_weather")
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")


@check
def a_streamed_call_and_its_result() -> None:
    asked = ASKED | {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    (call,) = message.tool_calls
    (other,) = client.chat.completions.create(**asked).choices[0].message.tool_calls
    expect(call.function.arguments, other.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
    called = {
        "role": "assistant",
        "content": message.content,
        "tool_calls": [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
        ],
    }
    asked |= {"messages": [*MESSAGES, called, result], "tool_choice": "none"}
    assert client.chat.completions.create(**asked).choices[0].message.content is not None


@check
def an_answer_parsed_by_pydantic() -> None:
    found = client.chat.completions.parse(**ASKED, response_format=City).choices[0].message.parsed
    assert isinstance(found, City)


@check
def a_response() -> None:
    asked = {"model": MODEL, "input": QUESTION, "max_output_tokens": LIMIT, "temperature": 0}
    found = client.responses.create(**asked)
    expect(found.status, "completed")
    expect_solved(found.output_text)
    with client.responses.stream(**asked) as stream:
        deltas = [one.delta for one in stream if one.type == "response.output_text.delta"]
        final = stream.get_final_response()
    expect("".join(deltas), found.output_text)
    expect(final.output_text, found.output_text)


@check
def a_response_parsed_by_pydantic() -> None:
    asked = {"model": MODEL, "input": QUESTION, "max_output_tokens": LIMIT, "temperature": 0}
    assert isinstance(client.responses.parse(**asked, text_format=City).output_parsed, City)


@check
def a_call_in_a_response() -> None:
    tool = {
        "type": "function",
        "name": WEATHER["name"],
        "description": WEATHER["description"],
        "parameters": WEATHER["schema"],
        "strict": True,
    }
    asked = {"model": MODEL, "input": QUESTION, "max_output_tokens": LIMIT, "temperature": 0}
    found = client.responses.create(**asked, tools=[tool], tool_choice="required")
    (call,) = [one for one in found.output if one.type == "function_call"]
    assert json.loads(call.arguments)["city"] in ("Paris", "Oslo")


def raised(kind: type, **changes: object) -> openai.APIStatusError:
    try:
        client.chat.completions.create(**ASKED | changes)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} was raised")


@check
def errors_are_the_clients_own() -> None:
    raised(openai.NotFoundError, model="no-such-model")
    assert "top_p" in str(raised(openai.BadRequestError, top_p=7).body["message"])
    raised(openai.BadRequestError, extra_body={"no_such_field": 1})
    long = [{"role": "user", "content": "word " * 200_000}]
    expect(raised(openai.BadRequestError, messages=long).code, "context_length_exceeded")


@check
def a_response_has_an_id_to_ask_about() -> None:
    raw = client.chat.completions.with_raw_response.create(**ASKED)
    assert raw.headers["x-request-id"]
    expect_solved(raw.parse().choices[0].message.content)


run_all()
