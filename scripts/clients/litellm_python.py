# SPDX-License-Identifier: Apache-2.0
"""litellm, by OpenAI's and Anthropic's interfaces."""

import litellm
from checks import KEY, LIMIT, MESSAGES, MODEL, URL, check, expect, expect_solved, run_all

ASKED = {
    "messages": MESSAGES,
    "max_tokens": LIMIT,
    "temperature": 0,
    "api_key": KEY,
    "timeout": 120,
    "num_retries": 0,
}
OPENAI = ASKED | {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1"}


@check
def a_chat() -> None:
    expect_solved(litellm.completion(**OPENAI).choices[0].message.content)


@check
def a_streamed_chat() -> None:
    pieces = [
        one.choices[0].delta.content or "" for one in litellm.completion(**OPENAI, stream=True)
    ]
    expect("".join(pieces), litellm.completion(**OPENAI).choices[0].message.content)


@check
def anthropics_messages() -> None:
    found = litellm.completion(**ASKED | {"model": f"anthropic/{MODEL}", "api_base": URL})
    expect_solved(found.choices[0].message.content)


@check
def errors_are_the_clients_own() -> None:
    try:
        litellm.completion(**OPENAI | {"model": "openai/no-such-model"})
    except litellm.NotFoundError:
        return
    raise AssertionError("no NotFoundError was raised")


run_all()
