# SPDX-License-Identifier: Apache-2.0
"""Tool calls told from content, however the text is cut; json says what is JSON."""

import json
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from answer_texts import CUTS, call, outputs
from meshwen.server.json_prefix import JsonPrefix
from meshwen.server.tool_calls import FENCES, ToolCalls

TOOLS = ("weather", "now")


def parse(text: str, cuts=None, tools=TOOLS, **given):
    """The content and the calls of a text, by default character by character."""
    parser = ToolCalls(tools, **given)
    found = outputs(parser, text, cuts)
    content, calls = "", []
    for one in found:
        content += one.content
        for delta in one.tool_calls:
            if delta.name is not None:
                assert (delta.index, delta.arguments) == (len(calls), "")
                calls.append([delta.name, "", delta.id])
            else:
                assert (delta.index, delta.id) == (len(calls) - 1, calls[-1][2])
                assert delta.arguments
                calls[-1][1] += delta.arguments
    assert len({id for _, _, id in calls}) == len(calls)
    assert parser.called_tools == bool(calls)
    return content, [(name, arguments) for name, arguments, _ in calls]


def test_several_calls_with_text_before_and_between():
    first, second = call("weather", '{"city": "Oslo"}'), call("now", "{}")
    text = f"One.\n{first}\nTwo.\n\n{second}\n"
    assert parse(text) == ("One.\nTwo.\n", [("weather", '{"city": "Oslo"}'), ("now", "{}")])


def test_white_space_alone_between_calls_is_no_content():
    text = f"\n{call('now', '{}')}\n \n{call('now', '{}')}\n\n"
    assert parse(text) == ("", [("now", "{}")] * 2)


def test_arguments_stay_as_they_are_written():
    arguments = '{ "a" :\n[1, -2.50e+3,true],  "b":"\\u00e9\\"}","c":{}}'
    assert json.loads(arguments)
    assert parse(call("weather", arguments)) == ("", [("weather", arguments)])


def test_arguments_may_quote_the_tags():
    arguments = '{"a": "</tool_call>\\n<tool_call>"}'
    assert parse(call("now", arguments)) == ("", [("now", arguments)])


@pytest.mark.parametrize("members", ['"name": "now"', '"name": "now", "arguments": null'])
def test_a_call_without_arguments_has_an_empty_object(members):
    assert parse(f"<tool_call>\n{{{members}}}\n</tool_call>") == ("", [("now", "{}")])


@pytest.mark.parametrize(
    "members",
    [
        '"arguments": {"a": {}}, "name": "now"',
        '"id": 5, "name": "now", "arguments": {"a": {}}',
        '"name": "now", "arguments": {"a": {}}, "more": [1, {"name": 0}]',
    ],
)
def test_members_come_in_any_order_beside_others(members):
    assert parse(f"<tool_call>{{{members}}}</tool_call>") == ("", [("now", '{"a": {}}')])


@pytest.mark.parametrize(
    "text",
    [
        call("unknown", '{"a": 1}'),
        '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": []}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": "{}"}\n</tool_call>',
        '<tool_call>\n{"name": "now", "name": "now", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        '<tool_call>\n{"arguments": {"a": 1}, "name": "unknown"}\n</tool_call>',
        "<tool_call>\n['now']\n</tool_call>",
        "<tool_call>\n{'name': 'now'}\n</tool_call>",
        '<tool_call>\n{"name": "now"\n</tool_call>',
        '<tool_call>\n{"name": "now", "argum',
        '<tool_call>\n{"name": "now", "arguments": ',
        "<tool_call>",
        "a < b <tool_cal",
        " \n",
    ],
)
def test_what_is_no_call_is_content(text):
    assert parse(text) == (text, [])
    assert parse(f"so\n{text} x") == (f"so\n{text} x", [])


def test_a_call_within_what_is_none_is_found():
    assert parse('<tool_call>{"x" <tool_call>' + call("now", "{}")) == (
        '<tool_call>{"x" <tool_call>',
        [("now", "{}")],
    )


def test_a_call_that_breaks_off_keeps_what_came():
    text = call("weather", '{"city": "Os')[: -len("}\n</tool_call>")]
    assert parse(text) == ("", [("weather", '{"city": "Os')])


def test_a_call_whose_arguments_break_ends_there_and_the_rest_is_content():
    text = call("weather", '{"city": Oslo}')
    assert parse(text) == ("Oslo}}\n</tool_call>", [("weather", '{"city": ')])


@pytest.mark.parametrize("end", ["\n</tool_call>", "}}\n</tool_call>", "}", "", "}\n"])
def test_a_wrong_end_after_whole_arguments_is_forgiven(end):
    text = f'<tool_call>\n{{"name": "now", "arguments": {{"a": 1}}{end}'
    assert parse(text) == ("", [("now", '{"a": 1}')])


def test_text_in_the_place_of_a_closing_tag_is_content():
    text = '<tool_call>\n{"name": "now", "arguments": {}}\n\nDone'
    assert parse(text) == ("\n\nDone", [("now", "{}")])


def test_a_line_end_within_a_string_is_written_as_json_has_it():
    assert parse(call("now", '{"a": "x\ny\t"}')) == ("", [("now", '{"a": "x\\ny\\t"}')])


def test_an_escape_of_half_a_character_breaks_a_call():
    whole = '{"a": "\\ud83c\\udfd4"}'
    assert parse(call("now", whole)) == ("", [("now", whole)])
    content, calls = parse(call("now", '{"a": "\\ud83c"}'))
    assert (content, calls) == ('"}}\n</tool_call>', [("now", '{"a": "\\ud83c')])
    content, calls = parse(call("now", '{"a": "\\udfd4"}'))
    assert (content, calls) == ('fd4"}}\n</tool_call>', [("now", '{"a": "\\ud')])


def test_a_call_begins_with_its_arguments_and_goes_on_piece_by_piece():
    parser = ToolCalls(TOOLS)
    assert not parser.push('<tool_call>\n{"name": "now", "arguments":')
    first, *rest = parser.push(' {"ci').tool_calls
    assert (first.name, first.arguments) == ("now", "")
    assert [one.arguments for one in rest] == ['{"ci']
    assert [one.arguments for one in parser.push('ty": "').tool_calls] == ['ty": "']


def test_content_is_not_held_back_longer_than_it_may_be_a_tag():
    parser = ToolCalls(TOOLS)
    assert parser.push("a <").content == "a"
    assert parser.push("b").content == " <b"


def test_content_after_a_call_is_not_given_before_it():
    parser = ToolCalls(TOOLS)
    found = parser.push(call("now", "{}") + "after")
    assert found.tool_calls
    assert not found.content
    assert parser.push(" all").content + parser.finish().content == "after all"


def test_any_name_is_a_tools_where_none_are_given():
    assert parse(call("whatever", "{}"), tools=None) == ("", [("whatever", "{}")])


def test_calls_beyond_the_most_are_content():
    text = call("now", "{}")
    assert parse(text + text, most=1) == (text, [("now", "{}")])


def test_fenced_json_is_a_call_only_when_asked_for():
    text = 'So:\n```json\n{\n  "name": "now",\n  "arguments": {"a": 1}\n}\n```\nYes'
    assert parse(text) == (text, [])
    assert parse(text, marks=FENCES) == ("So:\nYes", [("now", '{"a": 1}')])
    tagged = '<tools>\n{"name": "now"}\n</tools>'
    assert (parse(tagged), parse(tagged, marks=FENCES)) == ((tagged, []), ("", [("now", "{}")]))
    other = 'So:\n```json\n{"a": [1, 2]}\n```'
    assert parse(other, marks=FENCES) == (other, [])
    assert parse(call("now", "{}"), marks=FENCES) == ("", [("now", "{}")])


def test_bare_json_is_a_call_only_when_asked_for():
    bare = '{"name": "now", "arguments": {"a": 1}}'
    assert parse(bare) == (bare, [])
    assert parse(bare, bare=True) == ("", [("now", '{"a": 1}')])
    assert parse(f"\n{bare}\n{bare}\n", bare=True) == ("", [("now", '{"a": 1}')] * 2)
    assert parse(bare + call("now", "{}") + "So", bare=True) == (
        "So",
        [("now", '{"a": 1}'), ("now", "{}")],
    )
    for text in (f"So {bare}", '{"a": 1}', " {} x", "{", '{"name": "unknown", "arguments": {}}'):
        assert parse(text, bare=True) == (text, [])


# Texts that are nearly calls: parts of them in any order.
PARTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "\n", " ", '{"name": "now", ', '"arguments": ', '{"a": '),
        *(
            '"name": "now"',
            "{}",
            '"x"',
            '"',
            "}",
            "[",
            "]",
            ",",
            ":",
            "1",
            "é",
            "\\",
            "true",
            "nul",
        ),
        *("-", "tool", "```json", "```", call("weather", '{"city": "Zürich 🏔"}')),
        call("now", "{}"),
    ]
)
NEARLY = st.lists(PARTS, max_size=12).map("".join)


@settings(max_examples=400, deadline=None)
@given(NEARLY, CUTS, st.sampled_from([None, 1]))
def test_cuts_do_not_change_what_comes_out(text, cuts, most):
    assert parse(text, cuts, most=most) == parse(text, most=most)
    assert parse(text, cuts, marks=FENCES, bare=True) == parse(text, marks=FENCES, bare=True)


@settings(max_examples=400, deadline=None)
@given(NEARLY)
def test_all_text_comes_out_once_and_in_order(text):
    """Content is what is left of the text without the calls; without any, it is the text."""
    content, calls = parse(text)
    if not calls:
        assert content == text
    rest = iter(text)
    assert all(char in rest for char in content)
    for _, arguments in calls:
        assert arguments in text or arguments == "{}"
    assert len(content) + sum(len(arguments) for _, arguments in calls) <= len(text)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.text(max_size=5), JSON, max_size=3),
    st.sampled_from([None, 1]),
    st.booleans(),
    CUTS,
)
def test_what_json_writes_is_read_as_a_call(arguments, indent, ascii_only, cuts):
    written = json.dumps(arguments, indent=indent, ensure_ascii=ascii_only)
    assert parse(call("now", written), cuts) == ("", [("now", written)])


def scanned(text):
    """Whether the scanner takes a text for JSON."""
    scanner = JsonPrefix()
    taken = all(scanner.push(char) is not None for char in text + " ")
    return taken and scanner.state == "after" and not scanner.depth


def valid(text):
    """Whether Python does."""
    try:
        json.loads(text, strict=False, parse_constant=lambda name: 1 / 0)
    except (ValueError, ZeroDivisionError):
        return False
    return True


@settings(max_examples=400, deadline=None)
@given(st.text('{}[]",:\\ \n0123456789-+.eEtrufalsn"x', max_size=14) | JSON.map(json.dumps))
def test_the_scanner_takes_what_json_takes(text):
    assert scanned(text) == valid(text)


def test_the_scanner_takes_the_numbers_that_json_takes():
    for length in range(1, 6):
        for characters in product("0", "019-", "-.", "0-+.eE", "07.eE+"):
            text = "".join(characters[-length:])
            assert scanned(f"[{text}]") == valid(f"[{text}]"), text
