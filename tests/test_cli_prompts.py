# SPDX-License-Identifier: Apache-2.0
"""Prompts: from an argument, stdin or a file, and as text, messages or token ids."""

import io
import sys

import pytest

from meshwen.cli.prompts import read_prompts
from meshwen.errors import MeshwenError
from meshwen.tokenizer import Tokenizer
from speller import chat_ids, token_ids, write_speller


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_folder(write_speller(tmp_path_factory.mktemp("speller")))


@pytest.fixture
def stdin(monkeypatch):
    def pipe(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return pipe


def read_file(tmp_path, text):
    path = tmp_path / "prompts"
    path.write_text(text, encoding="utf-8")
    return read_prompts(None, str(path))


@pytest.mark.parametrize("argument", ["-", None])
def test_stdin_is_one_prompt_whatever_its_lines(stdin, argument):
    stdin("two\nlines, é\n\n".encode())
    (prompt,) = read_prompts(argument, None)
    assert prompt.content == "two\nlines, é\n"


def test_a_file_has_a_prompt_a_line(tmp_path):
    lines = (
        "plain text",
        '{"prompt": "a\\nb", "id": 7, "tags": ["x"]}',
        "",
        '{"messages": [{"role": "user", "content": "c"}]}',
        '{"prompt_tokens": [1, 2]}\r',
    )
    prompts = read_file(tmp_path, "\n".join(lines))
    assert [prompt.content for prompt in prompts] == [
        "plain text",
        "a\nb",
        [{"role": "user", "content": "c"}],
        [1, 2],
    ]
    assert prompts[1].extra == {"id": 7, "tags": ["x"]}
    assert [prompt.title() for prompt in prompts] == ["plain text", "a b", "c", "1 2"]


def test_prompts_file_may_be_stdin(stdin):
    stdin(b"one\ntwo")
    assert [prompt.content for prompt in read_prompts(None, "-")] == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ok\n{broken", "line 2, which begins with {: not valid JSON"),
        ('{"question": "q", "answer": "a"}', "line 1 must have one of .*; found question, answer"),
        ('{"prompt": "p", "messages": []}', "found prompt and messages"),
        ('{"prompt": " "}', "prompt must be text that is not empty"),
        ('{"messages": []}', "messages must be a list"),
        ('{"messages": ["hi"]}', "messages must be a list"),
        ('{"prompt_tokens": [1, true]}', "prompt_tokens must be a list of integers"),
        ("\n \n", "holds no prompt"),
    ],
)
def test_a_malformed_line_is_an_error_that_names_it(tmp_path, text, message):
    with pytest.raises(MeshwenError, match=message):
        read_file(tmp_path, text)


def test_input_that_is_not_utf8_is_an_error(stdin):
    stdin(b"\xff\xfe")
    with pytest.raises(MeshwenError, match="stdin is not UTF-8"):
        read_prompts("-", None)


def test_the_system_message_goes_where_there_is_none(tokenizer, tmp_path):
    plain, own = read_file(
        tmp_path,
        'hi\n{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]}',
    )
    with_system = chat_ids(("system", "t"), ("user", "hi"))
    assert list(plain.token_ids(tokenizer, raw=False, system="t")) == with_system
    assert list(plain.token_ids(tokenizer, raw=False, system=None)) == chat_ids(("user", "hi"))
    expected = chat_ids(("system", "s"), ("user", "hi"))
    assert list(own.token_ids(tokenizer, raw=False, system="t")) == expected


def test_raw_text_is_encoded_as_it_is(tokenizer, tmp_path):
    text, messages = read_file(tmp_path, 'hé\n{"messages": [{"role": "user", "content": "hi"}]}')
    assert list(text.token_ids(tokenizer, raw=True, system=None)) == token_ids("hé")
    with pytest.raises(MeshwenError, match="line 2: messages need the chat template"):
        messages.token_ids(tokenizer, raw=True, system=None)


def test_without_a_tokenizer_token_ids_are_asked_for(tmp_path):
    text, ids = read_file(tmp_path, 'hi\n{"prompt_tokens": [5, 6]}')
    assert ids.token_ids(None, raw=False, system=None) == (5, 6)
    with pytest.raises(
        MeshwenError, match=r'line 1: the model has no tokenizer; .*"prompt_tokens"'
    ):
        text.token_ids(None, raw=False, system=None)
