# SPDX-License-Identifier: Apache-2.0
"""Whatever a user of the Python API passes gets what it means, or one clear error."""

import array

import jax.numpy as jnp
import numpy as np
import pytest

from meshwen import SamplingParams, make_mesh
from meshwen.common.arguments import (
    number,
    one_prompt,
    several_prompts,
    token_ids,
    truth,
    whole_number,
)
from meshwen.common.paths import exists, user_path
from meshwen.errors import MeshwenError
from meshwen.models.qwen2 import Qwen2Config
from meshwen.tokenizer.tokenizer import Tokenizer
from speller import write_tokenizer

MESSAGE = {"role": "user", "content": "hi"}
IDS = (5, 6, 7)


def letters():
    yield "a"
    yield "b"


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("hi", ["hi"]),
        (np.str_("hi"), ["hi"]),
        ([5, 6, 7], [IDS]),
        (range(5, 8), [IDS]),
        (iter([5, 6, 7]), [IDS]),
        (np.array(IDS), [IDS]),
        (np.array(IDS, np.uint8), [IDS]),
        (jnp.array(IDS), [IDS]),
        (array.array("i", IDS), [IDS]),
        ([np.int64(5), jnp.int32(6), 7], [IDS]),
        (np.array([IDS, IDS]), [IDS, IDS]),
        (jnp.array([IDS]), [IDS]),
        ([np.array(IDS), "a", [8]], [IDS, "a", (8,)]),
        (letters(), ["a", "b"]),
        (np.array(["a", "b"]), ["a", "b"]),
        ([MESSAGE], [[MESSAGE]]),
        ([[MESSAGE], [MESSAGE, MESSAGE]], [[MESSAGE], [MESSAGE, MESSAGE]]),
        ([], []),
        ([[]], [()]),
    ],
)
def test_prompts_come_in_every_natural_form(given, prompts):
    found = several_prompts(given)
    assert found == prompts
    assert all(type(token) is int for one in found if isinstance(one, tuple) for token in one)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "prompts must be text or a list, not None"),
        (5, "not 5"),
        (b"hi", r"not be b'hi': decode\(\) the bytes"),
        ([b"hi"], r"decode\(\) the bytes"),
        ({"a"}, "must be text or a list, not {'a'}"),
        (MESSAGE, r"a message as \[message\]"),
        ({"input_ids": [[5]]}, "pass what it holds"),
        ([5, "a"], "text, or all lists of token ids, or one such list"),
        ([MESSAGE, "a"], "text, or all lists of token ids, or one such list"),
        (["a", None], "not None"),
        ([True, False], "not True"),
        ([[True]], "holds True"),
        ([[5.0]], "holds 5.0"),
        ([["a"]], "holds 'a'"),
        (np.array([1.5]), r"not an array float64 \(1,\)"),
        (np.array([True]), r"not an array bool \(1,\)"),
        (jnp.array(5), r"not an array int32 \(\)"),
        (np.zeros((1, 1, 1), int), "holds array"),
    ],
)
def test_what_is_no_prompt_is_named(given, message):
    with pytest.raises(MeshwenError, match=message):
        several_prompts(given)


def test_one_prompt_is_not_several():
    assert one_prompt(jnp.array(IDS)) == IDS
    assert one_prompt([MESSAGE]) == [MESSAGE]
    for several in (["a", "b"], [[5], [6]]):
        with pytest.raises(MeshwenError, match="a prompt must be text, token ids, or a conv"):
            one_prompt(several)


def test_numbers_of_every_library_become_pythons():
    for value in (3, np.int8(3), np.array(3), jnp.int32(3)):
        found = whole_number("n", value)
        assert (found, type(found)) == (3, int)
        assert type(number("x", value)) is int
    for value in (0.5, np.float32(0.5), np.array(0.5), jnp.bfloat16(0.5)):
        found = number("x", value)
        assert (found, type(found)) == (0.5, float)
    assert truth("t", np.True_) is True
    for check, value in (
        *((whole_number, v) for v in (True, np.True_, 3.0, "3", None, np.array([3]), [])),
        *((number, v) for v in (True, np.True_, "1", None, 10**400, 1j, np.array([0.5]), object())),
        *((truth, v) for v in (1, "yes", None, np.array([True]))),
        *((token_ids, v) for v in ("12", b"12", 5, None, [1.5], {1: 2}, {1})),
    ):
        with pytest.raises(MeshwenError, match=r"^name \S"):
            check("name", value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_k": True}, "top_k must be a whole number, not True"),
        ({"temperature": "1"}, "temperature must be a number, not '1'"),
        ({"logprobs": 5}, "logprobs must be true or false, not 5"),
        ({"stop": 5}, "stop must be strings that are not empty, not 5"),
        ({"stop": b"x"}, "stop must be strings"),
        ({"max_tokens": 5}, r"'max_tokens' \(did you mean max_new_tokens\?\); there are max_new_"),
    ],
)
def test_sampling_parameters_of_another_kind_are_named(given, message):
    with pytest.raises(MeshwenError, match=message):
        SamplingParams.from_generation_config({}, **given)


def test_sampling_parameters_of_every_library_become_pythons():
    found = SamplingParams.from_generation_config(
        {}, top_k=np.int8(3), temperature=jnp.float32(0.5), stop=iter(["x"]), seed=np.uint32(7)
    )
    assert found == SamplingParams(top_k=3, temperature=0.5, stop=("x",), seed=7)
    assert [type(found.top_k), type(found.temperature)] == [int, float]


@pytest.mark.parametrize(("given", "shape"), [(1, (1,)), (np.int64(1), (1,)), ((1, 1), (1, 1))])
def test_a_mesh_may_be_given_in_numbers(given, shape):
    assert make_mesh(given).devices.shape == shape


@pytest.mark.parametrize("given", [None, True, 1.0, b"1", (), [1.5], {"data": 1}, object()])
def test_what_is_no_mesh_is_named(given):
    with pytest.raises(MeshwenError, match=r"mesh must be text such as 8, .*Mesh, not \S"):
        make_mesh(given)


def test_tokenizers_name_what_they_cannot_take(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(jnp.array([1, 2])) == tokenizer.decode([1, -1, 2, 10**30])
    assert tokenizer.id_to_token(np.int64(10**12)) is None
    assert tokenizer.token_bytes(-1) == b""
    for call, given in (
        *((tokenizer.encode, v) for v in (b"hi", None, ["a"])),
        *((tokenizer.decode, v) for v in (5, "a", [5.5], [[5]], [None])),
        *((tokenizer.token_bytes, v) for v in (None, "a", 1.5, True)),
    ):
        with pytest.raises(MeshwenError):
            call(given)


@pytest.mark.parametrize("read", [Tokenizer.from_folder, Qwen2Config.from_json])
@pytest.mark.parametrize("given", [None, "", "x" * 400, "~nosuchuser/x", "a\0b"])
def test_paths_that_no_system_has_are_one_line(read, given):
    with pytest.raises(MeshwenError):
        read(given)


def test_a_home_is_found_or_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x") == tmp_path / "x"
    with pytest.raises(MeshwenError, match=r"~nosuchuser/x: .*; write the path without ~"):
        user_path("~nosuchuser/x")


def test_a_folder_that_may_not_be_entered_is_one_line(monkeypatch, tmp_path):
    def refuse(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.stat", refuse)
    with pytest.raises(MeshwenError, match=f"cannot look at {tmp_path}: Permission denied"):
        exists(tmp_path)
    with pytest.raises(MeshwenError, match="Permission denied"):
        Tokenizer.from_folder(tmp_path)
