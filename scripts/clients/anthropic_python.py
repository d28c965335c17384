# SPDX-License-Identifier: Apache-2.0
"""Anthropic's client for Python."""

import anthropic
from checks import (
    KEY,
    LIMIT,
    MESSAGES,
    MODEL,
    URL,
    WEATHER,
    check,
    expect,
    expect_solved,
    run_all,
)

OPTIONS = {"base_url": URL, "api_key": KEY, "timeout": 120, "max_retries": 0}
# Newer versions of the client have no argument for the temperature.
GREEDY = {"extra_body": {"temperature": 0}}
ASKED = {"model": MODEL, "messages": MESSAGES, "max_tokens": LIMIT} | GREEDY
client = anthropic.Anthropic(**OPTIONS)
TOOL = {
    "name": WEATHER["name"],
    "description": WEATHER["description"],
    "input_schema": WEATHER["schema"],
}


def whole() -> str:
    return client.messages.create(**ASKED).content[0].text


@check
def a_message() -> None:
    found = client.messages.create(**ASKED)
    expect_solved(found.content[0].text)
    expect(found.stop_reason, "end_turn")
    assert found.usage.output_tokens > 1


@check
def a_streamed_message() -> None:
    with client.messages.stream(**ASKED) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    expect(text, whole())
    expect(final.content[0].text, text)
    expect(final.stop_reason, "end_turn")


@check
async def an_asynchronous_message() -> None:
    async with anthropic.AsyncAnthropic(**OPTIONS) as other:
        expect((await other.messages.create(**ASKED)).content[0].text, whole())


@check
def a_system_message_and_parts() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    found = client.messages.create(**ASKED | {"system": "Be brief.", "messages": parts})
    expect(found.role, "assistant")


@check
def a_limit_of_tokens() -> None:
    found = client.messages.create(**ASKED | {"max_tokens": 2})
    expect((found.stop_reason, found.usage.output_tokens), ("max_tokens", 2))


@check
def tokens_are_counted() -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens
    expect(counted, client.messages.create(**ASKED).usage.input_tokens)


@check
def a_tool_that_has_to_be_called() -> None:
    asked = {"tools": [TOOL], "tool_choice": {"type": "any"}}
    found = client.messages.create(**ASKED, **asked)
    expect(found.stop_reason, "tool_use")
    (call,) = [one for one in found.content if one.type == "tool_use"]
    assert call.input["city"] in ("Paris", "Oslo")
    with client.messages.stream(**ASKED, **asked) as stream:
        (streamed,) = [one for one in stream.get_final_message().content if one.type == "tool_use"]
    expect(streamed.input, call.input)


@check
def errors_are_the_clients_own() -> None:
    for changes, kind in (
        ({"model": "no-such-model"}, anthropic.NotFoundError),
        ({"extra_body": {"top_p": 7}}, anthropic.BadRequestError),
    ):
        try:
            client.messages.create(**ASKED | changes)
        except kind:
            continue
        raise AssertionError(f"no {kind.__name__} was raised")


run_all()
