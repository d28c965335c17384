# SPDX-License-Identifier: Apache-2.0
"""Tokenizers as untrusted programs: usual ones run here, others are contained; none runs on."""

import json
from copy import deepcopy

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

from meshwen.common import contained
from meshwen.errors import MeshwenError
from meshwen.tokenizer.backend import InOwnProcess, InProcess, build, encoder, is_bounded
from meshwen.tokenizer.files import qwen2_content
from meshwen.tokenizer.tokenizer import Tokenizer

ALPHABET = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
QWEN2 = qwen2_content(ALPHABET | {"ab": 256}, ["a b"])
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def split(pattern):
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return step | {"invert": False}


def changed(**parts):
    return deepcopy(QWEN2) | parts


def sequence(kind, name, *steps):
    return changed(**{kind: {"type": "Sequence", name: list(steps)}})


def template(*single, ids=(1,)):
    token = {"id": "<t>", "ids": list(ids), "tokens": ["<t>"] * len(ids)}
    return {
        "type": "TemplateProcessing",
        "single": list(single),
        "pair": [],
        "special_tokens": {"<t>": token},
    }


# For (a+)+[bd]: four million steps at the beginning of each word, short of the library's limit.
TOO_MUCH = "é" + ("a" * 21 + "c ") * 1000
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BEFORE = {"SpecialToken": {"id": "<t>", "type_id": 0}}
HOSTILE = {
    "normalisers that double the text": sequence("normalizer", "normalizers", *[DOUBLE] * 40),
    "normalisers in one another": changed(
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Sequence", "normalizers": [DOUBLE] * 40}],
        }
    ),
    "bytes of bytes": sequence("pre_tokenizer", "pretokenizers", *[BYTES] * 40),
    "text twice, forty times": sequence(
        "post_processor", "processors", *[template(TEXT, TEXT)] * 40
    ),
    "many tokens around a text": changed(
        post_processor=template(TEXT, *[BEFORE] * 10_000, ids=[1] * 100_000)
    ),
    "a pattern that backtracks": sequence(
        "pre_tokenizer", "pretokenizers", split("(a+)+[bd]"), BYTES
    ),
    "a pattern that is too large": sequence(
        "pre_tokenizer", "pretokenizers", split("(((a{1,9999}){1,9999}){1,9999}){1,9999}b"), BYTES
    ),
    "two templates": sequence(
        "post_processor", "processors", *[template(BEFORE, TEXT, BEFORE)] * 2
    ),
    "a second text": changed(
        post_processor=template({"Sequence": {"id": "B", "type_id": 0}}, ids=())
    ),
    "megabytes of added tokens": changed(
        added_tokens=[{"id": 257, "content": "x" * (1 << 24), "special": True}]
    ),
    "a panic": changed(
        model={**QWEN2["model"], "continuing_subword_prefix": "é", "merges": ["a b", "ab é"]}
    ),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_tokenizer_that_runs_or_grows_without_bound_is_stopped(content, monkeypatch, capfd):
    monkeypatch.setattr(contained, "TIME_LIMIT_S", 1.0)
    monkeypatch.setattr(contained, "MEMORY_LIMIT_BYTES", 1 << 28)
    assert not is_bounded(content)
    with pytest.raises(
        MeshwenError, match=r"x\.json: the tokenizer (was stopped|failed): "
    ) as said:
        encoder(content, "x.json").encode(TOO_MUCH, True)
    assert "\n" not in str(said.value)
    assert capfd.readouterr() == ("", "")


USUAL = {
    "Qwen2's": QWEN2,
    "GPT-2's split": sequence("pre_tokenizer", "pretokenizers", BYTES | {"use_regex": True}),
    "digits": sequence(
        "pre_tokenizer", "pretokenizers", {"type": "Digits", "individual_digits": True}, BYTES
    ),
    "no normaliser": changed(normalizer=None),
    "an empty sequence": sequence("normalizer", "normalizers"),
    "a token before the text": changed(post_processor=template(BEFORE, TEXT)),
    "a byte-level post-processor": sequence("post_processor", "processors", BYTES, template(TEXT)),
}
UNUSUAL = {
    "another pattern": sequence("pre_tokenizer", "pretokenizers", split(r"\p{Lu}|\s+"), BYTES),
    "a replacement": changed(normalizer=DOUBLE),
    "cls and sep": changed(
        post_processor={"type": "BertProcessing", "sep": ["b", 1], "cls": ["a", 0]}
    ),
}


@pytest.mark.parametrize("name", [*USUAL, *UNUSUAL])
def test_a_tokenizer_gives_the_librarys_ids_wherever_it_runs(name):
    content = (USUAL | UNUSUAL)[name]
    found = encoder(content, "x.json")
    assert isinstance(found, InProcess if name in USUAL else InOwnProcess)
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    backend = Backend.from_str(json.dumps(whole | {"post_processor": None} | content))
    for text in ("", "Hello ABC abc 123", "é 日本 a\u0301\r\n", "ab" * 1000):
        for special in (True, False):
            expected = backend.encode(text, add_special_tokens=special).ids
            assert found.encode(text, special) == expected
            assert build(content).encode(text, add_special_tokens=special).ids == expected


def test_a_contained_tokenizer_goes_on_after_it_was_stopped(monkeypatch):
    monkeypatch.setattr(contained, "TIME_LIMIT_S", 1.0)
    found = encoder(HOSTILE["a pattern that backtracks"], "x.json")
    assert found.encode("ab", True) == [256]
    with pytest.raises(MeshwenError, match="the tokenizer"):
        found.encode(TOO_MUCH, True)
    assert found.encode("ab", True) == [256]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"type": "WordPiece"}}, "model.type is \"WordPiece\"; expected 'BPE'"),
        ({"model": {"dropout": 0.5}}, "model.dropout is 0.5; expected"),
        ({"model": {"vocab": {"a": 2**31}}}, "model.vocab.a is 2147483648; expected"),
        ({"model": {"vocab": ["a"]}}, "model.vocab is"),
        ({"model": {"vocab": {"a": 1, "b": 1}}}, "gives an id twice"),
        ({"model": {"merges": [["a"]]}}, "the merge ['a'] is not two tokens"),
        ({"model": {"merges": [1]}}, "model.merges[0] is 1; expected text or a list"),
        ({"model": {"merges": ["no way"]}}, "out of vocabulary"),
        ({"added_tokens": [{"id": 5, "content": "<x>"}]}, "gives an id twice"),
        ({"added_tokens": [{"id": 500, "content": "<x>"}]}, "'<x>' has the id 500, but its place"),
        ({"added_tokens": [{"content": "<x>"}]}, "added_tokens[0].id is missing"),
        ({"added_tokens": [{"id": 257, "content": "<x>", "special": 1}]}, "special is 1; expected"),
        ({"normalizer": {"type": "NFC "}}, "failed: "),
        ({"normalizer": "NFC"}, 'normalizer is "NFC"; expected an object'),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": {}}}, "failed: "),
        ({"decoder": None}, "decoder is null; expected an object"),
    ],
)
def test_content_of_another_form_is_refused_with_its_key(tmp_path, change, said):
    content = deepcopy(QWEN2)
    for key, value in change.items():
        content[key] = content[key] | value if key == "model" else value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(MeshwenError) as raised:
        Tokenizer.from_folder(tmp_path)
    assert said in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path / "tokenizer.json"))
    assert "\n" not in str(raised.value)
