# SPDX-License-Identifier: Apache-2.0
"""JSON in and out: what strangers' files may hold, and how it is refused."""

import json
import subprocess
import sys
from typing import Any, NotRequired

import pydantic_core
import pytest
from typing_extensions import TypedDict

from meshwen.common.json_files import (
    DEPTH_LIMIT,
    Finite,
    TokenId,
    check_shape,
    parse_json,
    read_json,
    shown,
    to_json,
)
from meshwen.errors import MeshwenError


class Part(TypedDict):
    name: str
    at: NotRequired[Finite]


class Whole(TypedDict):
    parts: list[Part]
    eos: NotRequired[TokenId | list[TokenId] | None]
    sizes: NotRequired[dict[str, int]]
    mode: NotRequired[bool]


PARTS: dict[str, Any] = {"parts": [{"name": "a"}, {"name": "b", "at": 1}]}

WRONG_SHAPES = [
    ([], "f: found []; expected an object"),
    ({}, "f: parts is missing"),
    ({"parts": {}}, "f: parts is {}; expected a list"),
    ({"parts": [{"name": "a"}, {}]}, "f: parts[1].name is missing"),
    ({"parts": [{"name": 3}]}, "f: parts[0].name is 3; expected text"),
    ({"parts": [{"name": "a", "at": float("nan")}]}, "parts[0].at is NaN; expected a finite"),
    ({"parts": [{"name": "a", "at": "1"}]}, 'parts[0].at is "1"; expected a number'),
    (PARTS | {"eos": True}, "eos is true; expected an integer or a list"),
    (PARTS | {"eos": 1.0}, "eos is 1.0; expected an integer or a list"),
    (PARTS | {"eos": -1}, "eos is -1; expected greater than or equal to 0 or a list"),
    (PARTS | {"eos": [1, "1023"]}, 'eos[1] is "1023"; expected an integer'),
    (PARTS | {"sizes": {"a.b\x1b": "x"}}, r'sizes["a.b\u001b"] is "x"; expected an integer'),
    (PARTS | {"mode": 1}, "mode is 1; expected true or false"),
]


@pytest.mark.parametrize(("value", "message"), WRONG_SHAPES, ids=[m for _, m in WRONG_SHAPES])
def test_another_shape_is_refused_with_its_key_value_and_what_was_expected(value, message):
    with pytest.raises(MeshwenError) as raised:
        check_shape(value, Whole, "f")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_value_of_the_shape_is_returned_as_it_is_with_keys_that_nobody_named():
    value = PARTS | {"eos": [1], "other": {"x": None}}
    assert check_shape(value, Whole, "f") is value


def test_a_million_wrong_values_are_not_a_million_errors():
    with pytest.raises(MeshwenError, match=r"eos\[0\] is null"):
        check_shape(PARTS | {"eos": [None] * 1_000_000}, Whole, "f")


NO_JSON = [
    (b'{"a": ', "not valid JSON"),
    (b"\xff\xfe", "not UTF-8 text (at byte 0)"),
    (b"[" * 100_000, "nested deeper than 100 levels"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested deeper than 100 levels"),
    (b"[" * (DEPTH_LIMIT + 1) + b"]" * (DEPTH_LIMIT + 1), "nested deeper than 100 levels"),
    (b'{"a": 1, "a": 2}', r"given twice, with different values"),
    (b'["\\ud83d"]', "half of a character"),
    (b"1" * 5000, "not valid JSON"),
]


@pytest.mark.parametrize(("text", "message"), NO_JSON, ids=[m for _, m in NO_JSON])
def test_text_that_is_no_json_is_refused(text, message):
    with pytest.raises(MeshwenError) as raised:
        parse_json(text, "f", hint="look")
    assert str(raised.value).startswith("f: ")
    assert message in str(raised.value)
    assert str(raised.value).endswith(": look")


def test_what_is_json_is_read():
    assert parse_json(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00", "b": 1, "b": 1}', "f") == {
        "a": "😀",
        "b": 1,
    }
    assert parse_json("[NaN, -Infinity]", "f")[1] == float("-inf")
    deepest = b"[" * DEPTH_LIMIT + b"]" * DEPTH_LIMIT
    assert json.dumps(parse_json(deepest, "f")).encode() == deepest


def test_files_that_cannot_be_read_are_refused(tmp_path):
    file = tmp_path / "some.json"
    for change, message in (
        (lambda: None, "cannot read .*some.json: No such file"),
        (file.mkdir, "cannot read .*some.json: Is a directory"),
        (lambda: (file.rmdir(), file.write_bytes(b" " * 100)), "larger than 0 MiB: ask"),
        (lambda: file.write_bytes(b"7"), "some.json: found 7; expected an object: ask"),
    ):
        change()
        with pytest.raises(MeshwenError, match=message):
            read_json(file, Whole, hint="ask", limit_bytes=50)
    with pytest.raises(MeshwenError, match="cannot read"):
        read_json(tmp_path / "a\0b", Whole)
    file.write_bytes(b'\xef\xbb\xbf{"parts": []}')
    assert read_json(file, Whole) == {"parts": []}


def test_what_is_written_is_valid_json():
    written = to_json({"a": [float("nan"), 1.5, (float("inf"),)], "b": "é\ud83d"})
    assert json.loads(written, parse_constant=pytest.fail) == {
        "a": [None, 1.5, [None]],
        "b": "é\ud83d",
    }
    assert to_json({"é": 1}, ensure_ascii=False, indent=1) == '{\n "é": 1\n}'


def test_values_are_shown_short_and_printable():
    assert shown("\x1b[31m\u202e\n") == r'"\u001b[31m\u202e\n"'
    assert shown("é" * 100) == '"' + "é" * 56 + "..."
    assert shown({"a": {1}}) == '{"a": "{1}"}'
    assert shown({(1, 2): 3}) == "a dict"
    circle: list[Any] = []
    circle.append(circle)
    assert shown(circle) == "a list"


def test_declaring_a_shape_imports_no_schema_library():
    code = "import meshwen.common.json_files, sys; sys.exit('pydantic' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ctrl_c_while_a_validator_is_built_is_ctrl_c(monkeypatch):
    def interrupted(schema):
        raise pydantic_core.SchemaError('Error building "literal" validator: Interrupted: ')

    monkeypatch.setattr(pydantic_core, "SchemaValidator", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_shape([1], list[int | None], "here")
