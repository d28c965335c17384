# SPDX-License-Identifier: Apache-2.0
"""LangChain, by its package for OpenAI."""

from typing import Literal

from checks import KEY, LIMIT, MODEL, QUESTION, URL, check, expect, expect_solved, run_all
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

model = ChatOpenAI(
    model=MODEL,
    base_url=f"{URL}/v1",
    api_key=KEY,
    temperature=0,
    max_tokens=LIMIT,
    timeout=120,
    max_retries=0,
)


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Oslo"]


@check
def a_chat() -> None:
    expect_solved(model.invoke(QUESTION).text)


@check
def a_streamed_chat() -> None:
    expect("".join(one.text for one in model.stream(QUESTION)), model.invoke(QUESTION).text)


@check
def several_at_once() -> None:
    first, second = model.batch([QUESTION, QUESTION])
    expect(first.text, second.text)


@check
def a_tool_that_has_to_be_called() -> None:
    bound = model.bind_tools([City], tool_choice="required", strict=True)
    calls = bound.invoke(QUESTION).tool_calls
    assert calls
    assert all(call["args"]["name"] in ("Paris", "Oslo") for call in calls)


@check
def structured_output() -> None:
    assert isinstance(model.with_structured_output(City).invoke(QUESTION), City)


run_all()
