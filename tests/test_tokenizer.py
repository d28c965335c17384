# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001 - look-alike characters are what is tested
"""Tokenizing: every form a checkpoint has gives the same ids, and streamed text equals decoded."""

import json

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from meshwen.errors import MeshwenError
from meshwen.tokenizer.tokenizer import Tokenizer, byte_alphabet

SPLIT = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
BOS = "<｜begin▁of▁sentence｜>"
ADDED = [
    AddedToken("<|endoftext|>", special=True, normalized=False),
    AddedToken("<|im_start|>", special=True, normalized=False),
    AddedToken("<|im_end|>", special=True, normalized=False),
    AddedToken(BOS, special=True, normalized=False),
    AddedToken("<tool_call>", special=False, normalized=False),
    AddedToken("｜naïve 日｜", special=False, normalized=False),
]
SAMPLES = [
    "",
    " ",
    "Hello, world!  It's 12345 o'clock.\r\n\r\n\tI'LL DON'T",
    "we'REally THE'SE I'Mine",
    "Größe naïve e\u0301 \u1e9b\u0323 ﬁ",
    "日本語のテキスト、中文文本，한국어 텍스트",
    "العربية עברית हिन्दी ไทย Ελληνικά Русский",
    "emoji 👨‍👩‍👧‍👦 🇫🇷 👍🏽 ☃️ 𝔘𝔫𝔦 \U0010ffff",
    "\x00\x01 \u200b\u2028\ufeff\xa0\u3000|",
    "def f(x):\n    return x ** 2  # ½ ² Ⅷ ٣\n\n\n",
    "<|im_start|>user\nhi<|im_end|>\n<tool_call>{}</tool_call><|endoftext|> <|im_start|",
]
CONFIG = {
    "eos_token": "<|im_end|>",
    "pad_token": {"content": "<|endoftext|>", "special": True},
    "bos_token": None,
    "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}


@pytest.fixture(scope="module")
def backend():
    """A byte-level BPE of 600 tokens, trained here and put together without meshwen.

    Its merges cross words, so that ids depend on where the split keeps words apart.
    """
    trained = Backend(BPE())
    trained.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = byte_level
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    trained.train_from_iterator(SAMPLES[:-1] * 3, trainer)
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trained.add_tokens(ADDED)
    return trained


@pytest.fixture
def folder(tmp_path, backend):
    """A checkpoint folder with tokenizer.json and tokenizer_config.json."""
    backend.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", CONFIG)
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, backend):
    path = tmp_path_factory.mktemp("tiny")
    backend.save(str(path / "tokenizer.json"))
    write_json(path / "tokenizer_config.json", CONFIG)
    return Tokenizer.from_folder(path)


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def base_model(backend):
    """The vocabulary and merges without the added tokens."""
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def gguf_metadata(backend, **changes):
    vocab, merges = base_model(backend)
    added = backend.get_added_tokens_decoder()
    tokens = sorted(vocab, key=vocab.get) + [added[index].content for index in sorted(added)]
    kinds = [1] * len(vocab) + [3 if added[index].special else 4 for index in sorted(added)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*tokens, "[PAD0]", "[PAD1]"],
        "tokenizer.ggml.token_type": [*kinds, 5, 5],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.eos_token_id": backend.token_to_id("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": backend.token_to_id("<|endoftext|>"),
        "tokenizer.ggml.bos_token_id": backend.token_to_id(BOS),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CONFIG["chat_template"],
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }


def assert_like_backend(tokenizer, backend):
    """The same ids and texts as the library's own tokenizer gives."""
    assert tokenizer.vocab_size == backend.get_vocab_size()
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        assert ids == backend.encode(text).ids
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == backend.decode(
                ids, skip_special_tokens=skip
            )


def test_tokenizer_json_gives_ids_texts_and_special_tokens(tokenizer, backend):
    assert_like_backend(tokenizer, backend)
    assert tokenizer.eos_token_ids == (backend.token_to_id("<|im_end|>"),)
    assert tokenizer.pad_token_id == backend.token_to_id("<|endoftext|>")
    assert tokenizer.id_to_token(tokenizer.pad_token_id) == "<|endoftext|>"
    assert tokenizer.id_to_token(10**6) is None
    assert tokenizer.decode([10**6, *tokenizer.encode("a")]) == "a"


def test_a_chat_is_rendered_and_its_special_tokens_are_recognised(tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages) == text
    ids = tokenizer.encode_chat(messages)
    assert ids == tokenizer.encode(text)
    assert [tokenizer.id_to_token(i) for i in ids].count("<|im_start|>") == 2
    assert tokenizer.decode(ids) == "user\nhi\nassistant\n"
    assert (
        tokenizer.encode_chat(messages, add_generation_prompt=False)
        == ids[: -ids[::-1].index(ids[0]) - 1]
    )


def write_vocab_and_merges(folder, backend):
    vocab, merges = base_model(backend)
    write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def added_tokens_decoder(backend):
    return {
        str(i): {"content": token.content, "special": token.special, "normalized": False}
        for i, token in backend.get_added_tokens_decoder().items()
    }


@pytest.mark.parametrize("added_in", ["tokenizer_config.json", "added_tokens.json"])
def test_vocab_and_merges_give_the_same_ids(tmp_path, backend, added_in):
    write_vocab_and_merges(tmp_path, backend)
    added = backend.get_added_tokens_decoder()
    if added_in == "added_tokens.json":
        write_json(tmp_path / added_in, {token.content: i for i, token in added.items()})
        special = [token.content for token in added.values() if token.special]
        write_json(tmp_path / "tokenizer_config.json", {"additional_special_tokens": special})
        write_json(tmp_path / "special_tokens_map.json", {"eos_token": "<|im_end|>"})
    else:
        described = {"added_tokens_decoder": added_tokens_decoder(backend)}
        write_json(tmp_path / added_in, {**CONFIG, **described})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert_like_backend(tokenizer, backend)
    assert tokenizer.eos_token_ids == (backend.token_to_id("<|im_end|>"),)


def test_gguf_metadata_gives_the_same_ids(backend):
    tokenizer = Tokenizer.from_gguf(gguf_metadata(backend))
    assert_like_backend(tokenizer, backend)
    ends = [backend.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert tokenizer.eos_token_ids == tuple(ends)
    assert tokenizer.pad_token_id == ends[1]
    assert "assistant" in tokenizer.apply_chat_template([])
    bos = backend.token_to_id(BOS)
    with_bos = Tokenizer.from_gguf(gguf_metadata(backend, add_bos_token=True))
    assert with_bos.encode("a") == [bos, *tokenizer.encode("a")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "model 'llama' with pre-tokenizer 'qwen2'"),
        ({"pre": "llama-bpe"}, "reads model 'gpt2' with pre-tokenizer 'qwen2' or"),
        ({"token_type": [1]}, "token_type has 1 entries for 591 tokens"),
        ({"eos_token_id": 10**6}, "eos_token_id is 1000000, which is no token's"),
        ({"bos_token_id": 10**6, "add_bos_token": True}, "bos_token_id is 1000000, which is no"),
        ({"eos_token_id": "5"}, r'tokenizer.ggml.eos_token_id is "5"; expected an integer'),
        ({"tokens": ["a", 5]}, r"tokenizer.ggml.tokens\[1\] is 5; expected text"),
        ({"merges": ["a"]}, "merge 'a' is not two tokens"),
        ({"merges": ["no way"]}, "the tokenizer is broken: .*out of vocabulary"),
        (
            {
                "tokens": ["a", "a"],
                "token_type": [1, 1],
                "eos_token_id": 0,
                "padding_token_id": 0,
                "bos_token_id": 0,
            },
            "lists a token twice",
        ),
    ],
)
def test_broken_gguf_metadata_is_an_error(backend, changes, message):
    with pytest.raises(MeshwenError, match=message):
        Tokenizer.from_gguf(gguf_metadata(backend, **changes))
    missing = gguf_metadata(backend)
    del missing["tokenizer.ggml.merges"]
    with pytest.raises(MeshwenError, match=r"tokenizer\.ggml\.merges is missing"):
        Tokenizer.from_gguf(missing)


def test_bos_comes_from_the_post_processor_and_not_into_chats(folder, backend):
    plain = Tokenizer.from_folder(folder).encode("a")
    bos = backend.token_to_id(BOS)
    with_bos = Backend.from_str(backend.to_str())
    with_bos.post_processor = processors.TemplateProcessing(
        single=[BOS, "$A"], special_tokens=[(BOS, bos)]
    )
    with_bos.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("a") == [bos, *plain]
    assert tokenizer.encode("a", add_special_tokens=False) == plain
    assert bos not in tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    write_json(folder / "tokenizer_config.json", {**CONFIG, "add_bos_token": False})
    assert Tokenizer.from_folder(folder).encode("a") == [bos, *plain]


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
def test_without_tokenizer_json_the_config_decides_on_bos_and_eos(
    tmp_path, backend, add_bos, add_eos
):
    write_vocab_and_merges(tmp_path, backend)
    flags = {"add_bos_token": add_bos, "add_eos_token": add_eos, "bos_token": BOS}
    described = {"added_tokens_decoder": added_tokens_decoder(backend)}
    write_json(tmp_path / "tokenizer_config.json", {**CONFIG, **flags, **described})
    tokenizer = Tokenizer.from_folder(tmp_path)
    tokens = [tokenizer.id_to_token(i) for i in tokenizer.encode("a")]
    assert tokens == [BOS] * add_bos + ["a"] + ["<|im_end|>"] * add_eos


def test_added_tokens_json_leaves_the_flags_of_tokenizer_json(folder, backend):
    added = backend.get_added_tokens_decoder()
    write_json(folder / "added_tokens.json", {token.content: i for i, token in added.items()})
    assert_like_backend(Tokenizer.from_folder(folder), backend)


def test_tokens_only_in_the_config_are_added(folder, backend):
    new = backend.get_vocab_size()
    token = {"content": "<|new|>", "special": True}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": {str(new): token}})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("<|new|>") == [new]
    assert tokenizer.decode([new]) == ""
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": {str(new + 5): token}})
    with pytest.raises(MeshwenError, match=rf"'<\|new\|>' has the id {new + 5}"):
        Tokenizer.from_folder(folder)


TOOL, END = "<tool_call>", "<|im_end|>"
FLAGS = {
    "special in the config": ({TOOL: {"special": True}}, {}, f"a {TOOL} b", "a  b"),
    "not special in the config": ({END: {"special": False}}, {}, f"a{END}", f"a{END}"),
    "not special but the eos": ({END: {"special": False}}, {"eos_token": END}, f"a{END}", "a"),
    "spaces before": ({TOOL: {"lstrip": True}}, {}, f"a  {TOOL} b", f"a{TOOL} b"),
    "spaces after": ({TOOL: {"rstrip": True}}, {}, f"a {TOOL}  b", f"a {TOOL}b"),
    "the eos takes no spaces": (
        {END: {"rstrip": True, "special": True}},
        {"eos_token": END},
        f"a{END}  b",
        "a  b",
    ),
    "additional": ({}, {"additional_special_tokens": [TOOL]}, f"a {TOOL}", "a "),
    "extra": ({}, {"extra_special_tokens": [{"content": TOOL}]}, f"a {TOOL}", "a "),
    "extra by name": ({}, {"extra_special_tokens": {"tool_token": TOOL}}, f"a {TOOL}", "a "),
    "extra and new": ({}, {"extra_special_tokens": ["<|new|>"]}, "a<|new|>", "a"),
    "a space first": ({}, {"add_prefix_space": True}, "a", " a"),
}


@pytest.mark.parametrize(("flags", "config", "text", "shown"), FLAGS.values(), ids=FLAGS.keys())
def test_the_configs_flags_of_added_tokens_count_as_in_transformers(
    folder, backend, flags, config, text, shown
):
    """What `shown` is was recorded from transformers 5.24's Qwen2Tokenizer."""
    decoder = {
        str(index): {"content": one.content, "special": one.special, "normalized": False}
        | flags.get(one.content, {})
        for index, one in backend.get_added_tokens_decoder().items()
    }
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder} | config)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == shown


def test_a_token_that_stands_alone_is_not_found_inside_of_a_word(folder, backend):
    index = backend.token_to_id(TOOL)
    decoder = {str(index): {"content": TOOL, "single_word": True}}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    tokenizer = Tokenizer.from_folder(folder)
    assert index in tokenizer.encode(f"a {TOOL} b")
    assert index not in tokenizer.encode(f"a{TOOL}b")


def test_special_tokens_can_be_split_into_text(folder, backend):
    write_json(folder / "tokenizer_config.json", {"split_special_tokens": True})
    ids = Tokenizer.from_folder(folder).encode(f"a{END}{TOOL}")
    assert backend.token_to_id(END) not in ids
    assert backend.token_to_id(TOOL) in ids


def test_a_pad_or_unk_token_that_is_in_no_vocabulary_blocks_nothing(folder, backend):
    config = CONFIG | {"pad_token": "[PAD]", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", config)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.pad_token_id is None
    assert_like_backend(tokenizer, backend)


@pytest.mark.parametrize("pre", ["default", None])
def test_gguf_files_of_older_programs_are_read(backend, pre):
    metadata = gguf_metadata(backend, pre=pre, padding_token_id=10**6)
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = Tokenizer.from_gguf(metadata)
    ids = [backend.token_to_id(token) for token in (END, TOOL)]
    assert tokenizer.encode(f"{END}{TOOL}") == ids
    assert tokenizer.decode(ids) == TOOL
    assert tokenizer.pad_token_id is None
    assert tokenizer.encode("[PAD0]") == backend.encode("[PAD0]").ids


def test_a_template_is_applied_with_transformers_options(tokenizer):
    hi = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(hi)
    ids = tokenizer.apply_chat_template(hi, tokenize=True, return_dict=False, padding=False)
    assert ids == tokenizer.encode(text) == tokenizer.encode_chat(hi)
    assert tokenizer.apply_chat_template(hi, tokenize=False, return_tensors=None) == text
    for option in ({"return_tensors": "np"}, {"truncation": True}, {"chat_template": "a"}):
        (name,) = option
        with pytest.raises(MeshwenError, match=f"does not offer {name}: it returns text"):
            tokenizer.apply_chat_template(hi, tokenize=True, **option)


def test_the_final_message_is_continued(tokenizer):
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    text = tokenizer.apply_chat_template(begun, **options)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nWell, "
    assert tokenizer.encode_chat(begun, **options) == tokenizer.encode(text)
    assert begun[1]["content"] == "Well, "
    with pytest.raises(MeshwenError, match="give add_generation_prompt=False"):
        tokenizer.apply_chat_template(begun, continue_final_message=True)
    for messages in ([], [{"role": "assistant"}], [{"role": "assistant", "content": ["a"]}]):
        with pytest.raises(MeshwenError, match="a last message whose content is text"):
            tokenizer.apply_chat_template(messages, **options)


def test_a_text_longer_than_any_context_is_refused(tokenizer):
    with pytest.raises(MeshwenError, match="8388609 characters, more than any context"):
        tokenizer.encode("a" * (2**23 + 1))


def test_without_a_config_nothing_is_special_and_no_chat_is_possible(folder, backend):
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_folder(folder)
    assert_like_backend(tokenizer, backend)
    assert tokenizer.eos_token_ids == ()
    assert tokenizer.pad_token_id is None
    with pytest.raises(MeshwenError, match="use --raw"):
        tokenizer.apply_chat_template([])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json: not valid JSON"),
        (
            "tokenizer.json",
            "{}",
            "tokenizer.json: model is missing: it is damaged, or no",
        ),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config.json: found \[\]; expected an object"),
        ("tokenizer_config.json", '{"a":' * 10**5, "tokenizer_config.json: nested deeper"),
        ("tokenizer_config.json", '{"eos_token": "<nope>"}', "eos_token '<nope>' is not in the"),
        (
            "tokenizer_config.json",
            '{"eos_token": 5}',
            "tokenizer_config.json: eos_token is 5; expected text or",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"1": {}}}',
            r"decoder\.1\.content is missing",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "'x' for a"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {"content": ""}}}', "1 is empty"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "a"}]}', r"\[0\]\.template is"),
        ("tokenizer_config.json", '{"additional_special_tokens": [7]}', r"tokens\[0\] is 7"),
        ("added_tokens.json", '{"<x>": "one"}', 'added_tokens.json: "<x>" is "one"; expected an'),
        ("special_tokens_map.json", '{"pad_token": []}', r"special_tokens_map.json: pad_token is"),
    ],
)
def test_a_broken_file_is_an_error_that_names_it(folder, name, content, message):
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(MeshwenError, match=message) as caught:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(MeshwenError, match="no tokenizer here"):
        Tokenizer.from_folder(tmp_path)
    write_json(tmp_path / "vocab.json", {"a": "b"})
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(MeshwenError, match=r'vocab\.json: a is "b"; expected an integer'):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(folder, backend):
    other = Backend.from_str(backend.to_str())
    other.decoder = decoders.Metaspace()
    other.save(str(folder / "tokenizer.json"))
    with pytest.raises(
        MeshwenError, match=r"""decoder.type is "Metaspace"; expected 'ByteLevel'"""
    ):
        Tokenizer.from_folder(folder)


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(MeshwenError, match="not valid Unicode"):
        tokenizer.encode("a\udc80")


def test_the_byte_alphabet_is_the_librarys():
    alphabet = byte_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    assert alphabet["A"] == 65
    assert alphabet["Ġ"] == 32
    assert alphabet["Ċ"] == 10


def byte_ids(tokenizer, data):
    """One token for each byte, whatever the merges are."""
    spelling = {byte: character for character, byte in byte_alphabet().items()}
    ids = {tokenizer.id_to_token(i): i for i in range(tokenizer.vocab_size)}
    return [ids[spelling[byte]] for byte in data]


@pytest.mark.parametrize(
    ("data", "pieces", "rest"),
    [
        ("é!".encode(), ["", "é", "!"], ""),
        ("日".encode(), ["", "", "日"], ""),
        ("👍🏽".encode(), ["", "", "", "👍", "", "", "", "🏽"], ""),
        ("👍".encode()[:3], ["", "", ""], "\ufffd"),
        (b"\xe6\x97a", ["", "", "\ufffda"], ""),
        (b"\xff\x80a", ["\ufffd", "\ufffd", "a"], ""),
        (b"\xf0\x9f\xe6\x97\xa5", ["", "", "\ufffd", "", "日"], ""),
    ],
)
def test_streaming_gives_whole_characters_and_marks_bytes_that_are_none(
    tokenizer, data, pieces, rest
):
    stream = tokenizer.stream_decoder()
    assert [stream.push(i) for i in byte_ids(tokenizer, data)] == pieces
    assert stream.finish() == rest


def test_streaming_skips_special_and_unknown_tokens_in_the_midst_of_a_character(tokenizer):
    first, second = byte_ids(tokenizer, "é".encode())
    stream = tokenizer.stream_decoder()
    ids = [first, tokenizer.eos_token_ids[0], 10**6, second]
    assert [stream.push(i) for i in ids] == ["", "", "", "é"]
    assert tokenizer.decode(ids) == "é"


def assert_stream_equals_decode(tokenizer, ids):
    stream = tokenizer.stream_decoder()
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)


@given(data=st.data())
@settings(max_examples=500, deadline=None)
def test_streamed_text_equals_decoded_text(tokenizer, data):
    single_bytes = byte_ids(tokenizer, range(256))
    ids = st.integers(0, tokenizer.vocab_size + 3) | st.sampled_from(single_bytes)
    assert_stream_equals_decode(tokenizer, data.draw(st.lists(ids, max_size=40)))


@given(text=st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_survives_up_to_its_normal_form(tokenizer, backend, text):
    ids = tokenizer.encode(text)
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    assert decoded == backend.normalizer.normalize_str(text)
    assert_stream_equals_decode(tokenizer, ids)


@pytest.fixture(scope="module")
def real(real_model_dir):
    return Tokenizer.from_folder(real_model_dir)


@pytest.mark.real
def test_golden_prompts_and_answers(real, golden):
    for case in golden["cases"]:
        if "messages" in case:
            assert real.encode_chat(case["messages"]) == case["input_ids"], case["name"]
        else:
            assert real.encode(case["text"]) == case["input_ids"], case["name"]
        text = real.decode(case["greedy"], skip_special_tokens=False)
        assert text == case["text_out"], case["name"]
        assert_stream_equals_decode(real, case["greedy"])


@pytest.mark.real
def test_the_real_vocabulary_and_merges_give_the_ids_of_its_tokenizer_json(
    real, real_model_dir, tmp_path
):
    write_vocab_and_merges(tmp_path, Backend.from_file(str(real_model_dir / "tokenizer.json")))
    config = (real_model_dir / "tokenizer_config.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(config, encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size == real.vocab_size
    for text in SAMPLES:
        assert tokenizer.encode(text) == real.encode(text)


@pytest.mark.real
def test_real_special_tokens(real):
    assert real.vocab_size == 151665
    assert real.eos_token_ids == (151645,)
    assert real.pad_token_id == 151643


@pytest.mark.real
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_real_streamed_text_equals_decoded_text(real, data):
    ids = st.integers(0, 151935) | st.integers(0, 255) | st.integers(151640, 151670)
    assert_stream_equals_decode(real, data.draw(st.lists(ids, max_size=40)))


@pytest.mark.real
def test_a_long_stream_stays_fast(real):
    """Re-decoding everything at each token would take hours here."""
    stream = real.stream_decoder()
    assert sum(len(stream.push(14990)) for _ in range(100_000)) == 500_000


@pytest.mark.real
@pytest.mark.slow
def test_the_gguf_file_gives_the_same_ids(real, real_model_dir, golden):
    path = real_model_dir.parent / f"{real_model_dir.name}.gguf"
    if not path.is_file():
        pytest.skip(f"no GGUF file at {path}")
    fields = gguf.GGUFReader(path).fields.items()
    metadata = {k: field.contents() for k, field in fields if k.startswith("tokenizer.")}
    tokenizer = Tokenizer.from_gguf(metadata)
    for case in golden["cases"]:
        if "messages" in case:
            assert tokenizer.encode_chat(case["messages"]) == case["input_ids"]
        else:
            assert tokenizer.encode(case["text"]) == case["input_ids"]
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        assert ids == real.encode(text)
        assert tokenizer.decode(ids) == real.decode(ids)
    assert tokenizer.eos_token_ids == (151645, 151643)
    assert tokenizer.vocab_size == real.vocab_size


@pytest.mark.torch
@pytest.mark.real
def test_ids_and_texts_equal_transformers(real, real_model_dir):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(real_model_dir)
    for text in SAMPLES:
        ids = real.encode(text)
        assert ids == theirs.encode(text)
        assert real.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
