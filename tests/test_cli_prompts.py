# SPDX-License-Identifier: Apache-2.0
"""Prompts: from an argument, stdin or a file, and as text, messages or token ids."""

import io
import json
import sys

import pytest

from meshwen.cli.prompts import ignored_fields, read_prompts, read_template_kwargs
from meshwen.errors import MeshwenError
from meshwen.tokenizer.tokenizer import Tokenizer
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
        ('{"prompt": " "}', 'prompt must be text that is not empty, not " "'),
        ('{"messages": []}', "messages must be a list"),
        ('{"messages": ["hi"]}', r'messages must be a list .*, not \["hi"\]'),
        ('{"prompt_tokens": [1, true]}', "prompt_tokens must be a list of integers"),
        ("\n \n", "holds no prompt"),
        ('[{"role": "user", "content": "a"}]', "line 1 is a JSON array; write one prompt a line"),
        ("ok\n [1, 2]", "line 2 is a JSON array"),
        ('[\n"a",\n"b"\n]', "is one JSON value over several lines; write one prompt a line"),
        ('{\n"prompt": "a"\n}', "is one JSON value over several lines"),
        ('{"prompt": "a", "prompt": "b"}', r'line 1.* .key "prompt" is given twice'),
        ('{"prompt": "a", "tools": {"name": "t"}}', "line 1: tools must be a list of objects"),
    ],
)
def test_a_malformed_line_is_an_error_that_names_it(tmp_path, text, message):
    with pytest.raises(MeshwenError, match=message):
        read_file(tmp_path, text)


@pytest.mark.parametrize("line", ["[1] Why?", "[ ]x", '"quoted"', "42", "[INST] hi"])
def test_text_that_looks_like_json_stays_text(tmp_path, line):
    (prompt,) = read_file(tmp_path, line)
    assert prompt.content == line


def test_a_byte_order_mark_is_no_part_of_a_prompt(stdin, tmp_path):
    (prompt,) = read_file(tmp_path, '\ufeff{"prompt_tokens": [1]}')
    assert prompt.content == [1]
    joined = read_file(tmp_path, '\ufeffhi\n\ufeff{"prompt": "you"}\n\ufeff\n')  # By cat.
    assert [prompt.content for prompt in joined] == ["hi", "you"]
    stdin("\ufeffhi".encode())
    (prompt,) = read_prompts("-", None)
    assert prompt.content == "hi"


def test_tools_and_documents_reach_the_template(tmp_path):
    folder = write_speller(tmp_path / "speller")
    template = "{{ tools }} {{ documents }} {{ messages[0].content }}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = Tokenizer.from_folder(folder)
    asked = {"tools": [{"name": "t"}], "documents": [{"text": "d"}]}
    messages = {"messages": [{"role": "user", "content": "hi"}]}
    lines = [{"prompt": "hi", **asked}, messages | asked, {"prompt": "hi", "tools": []}]
    one, other, without = read_file(tmp_path, "\n".join(map(json.dumps, lines)))
    expected = token_ids("[{'name': 't'}] [{'text': 'd'}] hi")
    assert list(one.token_ids(tokenizer, raw=False, system=None)) == expected
    assert list(other.token_ids(tokenizer, raw=False, system=None)) == expected
    assert list(without.token_ids(tokenizer, raw=False, system=None)) == token_ids("None None hi")
    with pytest.raises(MeshwenError, match="line 1: tools need the chat template, which --raw"):
        one.token_ids(tokenizer, raw=True, system=None)


def test_template_kwargs_reach_the_template_beside_a_prompts_own_fields(tokenizer, tmp_path):
    variables = read_template_kwargs('{"enable_thinking": false}')
    said = '{"messages": [{"role": "user", "content": "hi"}]}'
    text, messages, ids = read_file(tmp_path, f'hi\n{said}\n{{"prompt_tokens": [1]}}')
    expected = [*chat_ids(("user", "hi")), *token_ids("<think></think>")]
    assert list(text.token_ids(tokenizer, template_kwargs=variables)) == expected
    assert list(messages.token_ids(tokenizer, template_kwargs=variables)) == expected
    with pytest.raises(MeshwenError, match="line 3: --chat-template-kwargs needs the chat temp"):
        ids.token_ids(tokenizer, template_kwargs=variables)
    assert read_template_kwargs(None) == {}
    for wrong in ("[1]", "{", '{"tokenize": true}'):
        with pytest.raises(MeshwenError, match=r"chat.template.kwargs"):
            read_template_kwargs(wrong)


def test_fields_that_change_nothing_are_named(tmp_path):
    prompts = read_file(tmp_path, '{"prompt": "a", "tools": [], "id": 1, "temperature": 0.5}\nb')
    line = ignored_fields(prompts, returned=False)
    assert line == "fields of the prompts that change nothing: 'id', 'temperature'"
    line = ignored_fields(prompts, returned=True)
    assert "only come back, and set nothing: 'temperature';" in line
    assert ignored_fields(prompts[1:], returned=True) is None
    many = read_file(tmp_path, json.dumps({"prompt": "a"} | {str(i): i for i in range(20)}))
    assert ignored_fields(many, returned=False).endswith(" '7', ...")


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
