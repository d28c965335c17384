# SPDX-License-Identifier: Apache-2.0
"""A tokenizer's files, written anew: they give the same ids, texts and chat prompts."""

import json

import pytest
from tokenizers import Tokenizer as Backend

from checkpoint_writers import write_json
from meshwen.tokenizer.backend import InOwnProcess
from meshwen.tokenizer.tokenizer import Tokenizer
from speller import TEMPLATE, write_tokenizer
from test_tokenizer import SAMPLES, gguf_metadata

MESSAGES = [{"role": "user", "content": "hi"}]


def again(tokenizer: Tokenizer, folder) -> Tokenizer:
    """The tokenizer of another one's files."""
    for name, text in tokenizer.files().items():
        (folder / name).write_text(text, encoding="utf-8")
    return Tokenizer.from_folder(folder)


def assert_same(found: Tokenizer, expected: Tokenizer) -> None:
    assert found.content == expected.content
    assert found.pad_token_id == expected.pad_token_id
    for text in SAMPLES:
        ids = expected.encode(text)
        assert found.encode(text) == ids
        for skip in (True, False):
            assert found.decode(ids, skip) == expected.decode(ids, skip)
    if "default" in expected.content["chat template"]:
        assert found.encode_chat(MESSAGES) == expected.encode_chat(MESSAGES)


def changed_folder(folder, config=None, **parts):
    """The speller's tokenizer with other parts of tokenizer.json and keys of its config."""
    folder.mkdir()
    write_tokenizer(folder)
    for name, changes in (("tokenizer.json", parts), ("tokenizer_config.json", config or {})):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        write_json(folder / name, content | changes)
    return folder


BEFORE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [],
    "special_tokens": {
        "<|im_start|>": {"id": "<|im_start|>", "ids": [257], "tokens": ["<|im_start|>"]}
    },
}
NAMED = [{"name": name, "template": name + TEMPLATE} for name in ("default", "tool_use", "rag")]
CASES = {
    "usual": {},
    "tokens around a text": {"post_processor": BEFORE},
    "special tokens that are text": {"config": {"split_special_tokens": True}},
    "several chat templates": {"config": {"chat_template": NAMED}},
    "no default chat template": {"config": {"chat_template": NAMED[1:]}},
    "no chat template": {"config": {"chat_template": None}},
    "no special tokens": {"config": {"eos_token": None}},
    "more special tokens": {
        "config": {"pad_token": "<|endoftext|>", "extra_special_tokens": ["<|new|>", "日本"]}
    },
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_the_files_of_a_folder_make_the_same_tokenizer(tmp_path, changes):
    expected = Tokenizer.from_folder(changed_folder(tmp_path / "original", **changes))
    (tmp_path / "again").mkdir()
    assert_same(again(expected, tmp_path / "again"), expected)


def test_the_files_of_an_unusual_tokenizer_are_written_by_the_process_that_runs_it(tmp_path):
    doubled = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    folder = changed_folder(tmp_path / "original", normalizer=doubled)
    expected = Tokenizer.from_folder(folder)
    assert isinstance(expected._encoder, InOwnProcess)
    (tmp_path / "again").mkdir()
    found = again(expected, tmp_path / "again")
    assert_same(found, expected)
    assert found.encode("a") == found.encode("aa")[:2] != []


@pytest.mark.parametrize("add_bos", [True, False])
def test_gguf_metadata_becomes_files(tmp_path, add_bos):
    """Of the ends of a text, the files name one; the others are in generation_config.json."""
    write_tokenizer(tmp_path)
    original = Backend.from_file(str(tmp_path / "tokenizer.json"))
    metadata = gguf_metadata(original, add_bos_token=add_bos, bos_token_id=257)
    expected = Tokenizer.from_gguf(metadata)
    found = again(expected, tmp_path)
    content = expected.content
    assert found.content == content | {"eos_token_ids": content["eos_token_ids"][:1]}
    library = Backend.from_file(str(tmp_path / "tokenizer.json"))
    for text in SAMPLES:
        ids = expected.encode(text)
        assert found.encode(text) == ids == library.encode(text).ids
        assert found.decode(ids) == expected.decode(ids)


@pytest.mark.torch
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_transformers_reads_the_files(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    expected = Tokenizer.from_folder(changed_folder(tmp_path / "original", **changes))
    folder = tmp_path / "again"
    folder.mkdir()
    again(expected, folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in SAMPLES:
        ids = expected.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == expected.decode(ids)
    if "default" in expected.content["chat template"]:
        prompt = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        assert prompt == expected.apply_chat_template(MESSAGES)
