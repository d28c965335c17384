# SPDX-License-Identifier: Apache-2.0
"""Reasoning told from what is answered, however the text is cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from answer_texts import CUTS, call, outputs
from meshwen.server.parsing import PlainText
from meshwen.server.reasoning import Reasoning
from meshwen.server.tool_calls import ToolCalls


def parse(text, cuts=None, inside=False, tools=False):
    """The reasoning, the content and the calls' names of a text."""
    parser = Reasoning(ToolCalls({"now"}) if tools else PlainText(), inside)
    found = outputs(parser, text, cuts)
    names = [one.name for parsed in found for one in parsed.tool_calls if one.name]
    assert parser.called_tools == bool(names)
    return "".join(p.reasoning for p in found), "".join(p.content for p in found), names


def test_reasoning_is_apart():
    assert parse("<think>\nHm,\n\nwell.\n</think>\n\nYes.\n") == ("Hm,\n\nwell.", "Yes.\n", [])


def test_reasoning_that_the_prompt_has_begun_is_apart():
    assert parse("Hm.\n</think>\n\nYes.", inside=True) == ("Hm.", "Yes.", [])


@pytest.mark.parametrize("text", ["Yes.", " \n", "<thin", "a <think>b</think>", "</think>", ""])
def test_what_does_not_begin_with_the_tag_is_content(text):
    assert parse(text) == ("", text, [])


def test_an_answer_that_ends_within_is_all_reasoning():
    assert parse("<think>\nHm, </thin") == ("Hm, </thin", "", [])
    assert parse("Hm\n", inside=True) == ("Hm\n", "", [])


def test_empty_reasoning_is_none():
    assert parse("<think>\n\n</think>\n\nYes.") == ("", "Yes.", [])


def test_white_space_may_come_before_the_tag():
    assert parse("\n<think>a</think>b") == ("a", "b", [])


def test_further_tags_are_content():
    assert parse("<think>a</think>b <think>c</think>") == ("a", "b <think>c</think>", [])


def test_calls_come_after_reasoning_and_not_within():
    quoted = call("now", "{}")
    found = parse(f"<think>\nI could {quoted}\n</think>\n\nSo:\n{quoted}", tools=True)
    assert found == (f"I could {quoted}", "So:", ["now"])


def test_reasoning_is_given_as_it_comes():
    parser = Reasoning(PlainText())
    assert [parser.push(text).reasoning for text in ("<think>", "\nHm", ",\n", "so", "\n<")] == [
        *("", "Hm", ",", "\nso", "")
    ]


PARTS = st.sampled_from(["<think>", "</think>", "\n", " ", "ab", "<", "</", "think>", "é"])


@settings(max_examples=400, deadline=None)
@given(st.lists(PARTS | st.just(call("now", "{}")), max_size=9).map("".join), CUTS, st.booleans())
def test_cuts_do_not_change_what_comes_out(text, cuts, inside):
    assert parse(text, cuts, inside, tools=True) == parse(text, None, inside, tools=True)
    reasoning, content, _ = parse(text, cuts, inside)
    tags = ("<think>", "</think>")
    bare = text.translate({10: None})
    for tag in tags:
        bare = bare.replace(tag, "")
    found = (reasoning + content).translate({10: None})
    for tag in tags:
        found = found.replace(tag, "")
    assert found.replace(" ", "") == bare.replace(" ", "")
