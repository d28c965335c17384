# SPDX-License-Identifier: Apache-2.0
"""Activations are read in every form numpy gives them; any other file is refused in one line."""

import io
import zipfile

import ml_dtypes
import numpy as np
import pytest

from foreign_run import PROMPTS, foreign_run, save
from meshwen.errors import MeshwenError
from meshwen.verify import activation_file
from meshwen.verify.activation_file import MOST_TOKENS, read_activations
from meshwen.verify.operations import EMBEDDING, LOGITS, Operation, modules
from tiny_model import TINY, weights
from verify_model import mesh_run

NAME, D, V = "model.embed_tokens", TINY.hidden_size, TINY.vocab_size
SHAPE = (*PROMPTS.shape, D)
VALUES = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def read(path):
    return read_activations(path, TINY, modules(mesh_run("1").runner.model.weights))


def read_arrays(folder, **arrays):
    return read(save(folder, {"input_ids": PROMPTS} | arrays))


def test_a_whole_run_is_read_in_the_order_of_the_forward_pass(tmp_path):
    arrays = foreign_run(TINY, weights())
    found = read(save(tmp_path, dict(reversed(arrays.items()))))
    assert [str(operation) for operation in found.values][:3] == [
        *("embedding", "layer 0, input_layernorm", "layer 0, attention output")
    ]
    assert list(found.values)[-1] == LOGITS
    assert found.values[LOGITS].shape == (*PROMPTS.shape, V)
    np.testing.assert_array_equal(
        found.values[Operation(1, "MLP output")], arrays["model.layers.1.mlp"]
    )


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (VALUES, VALUES),
        (VALUES.astype(np.float64), VALUES.astype(np.float64)),
        (VALUES.astype(">f4"), VALUES),
        (np.asfortranarray(VALUES), VALUES),
        (VALUES.astype(np.float16), VALUES.astype(np.float16)),
        (VALUES.astype(ml_dtypes.bfloat16), VALUES.astype(ml_dtypes.bfloat16)),
        (
            VALUES.astype(ml_dtypes.bfloat16).view(np.uint16),
            VALUES.astype(ml_dtypes.bfloat16),
        ),
    ],
    ids=["float32", "float64", "big-endian", "fortran", "float16", "bfloat16", "as-uint16"],
)
def test_every_dtype_and_order_is_read(written, kept, tmp_path):
    found = read_arrays(tmp_path, **{NAME: written}).values[EMBEDDING]
    assert found.dtype == kept.dtype
    np.testing.assert_array_equal(found, kept)


def test_one_prompt_needs_no_batch_axis(tmp_path):
    arrays = {"input_ids": PROMPTS[0].astype(np.uint16), NAME: VALUES[0]}
    found = read(save(tmp_path, arrays))
    assert found.input_ids.shape == (1, PROMPTS.shape[1])
    np.testing.assert_array_equal(found.values[EMBEDDING], VALUES[:1])


def test_compressed_arrays_are_read(tmp_path):
    np.savez_compressed(tmp_path / "dump.npz", input_ids=PROMPTS, **{NAME: VALUES})
    np.testing.assert_array_equal(read(tmp_path / "dump.npz").values[EMBEDDING], VALUES)


def with_value(value, dtype=np.float32):
    changed = VALUES.astype(dtype)
    changed[1, 2, 3] = value
    return changed


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({}, "has no activation beside input_ids"),
        ({NAME: VALUES, "input_ids": PROMPTS.astype(float)}, "must be integers .T. or .B, T."),
        ({NAME: VALUES, "input_ids": PROMPTS[None]}, "must be integers .T. or .B, T., not int64"),
        ({NAME: VALUES, "input_ids": PROMPTS[:, :0]}, "must be integers"),
        ({NAME: VALUES, "input_ids": PROMPTS - 5}, "token id -2, outside of the vocabulary of 263"),
        ({NAME: VALUES, "input_ids": PROMPTS + 200}, "token id .*, outside of the vocabulary"),
        ({NAME: VALUES, "input_ids": np.zeros(1101, np.int64)}, "the model's context is 1100"),
        (
            {NAME: VALUES, "input_ids": np.zeros((MOST_TOKENS, 2), np.int8)},
            f"65536 tokens: give at most {MOST_TOKENS}",
        ),
        ({NAME: VALUES[:, :-1]}, r"must be \[2, 11, 32\], not \[2, 10, 32\]"),
        ({NAME: VALUES[..., :-1]}, r"must be \[2, 11, 32\], not \[2, 11, 31\]"),
        ({NAME: VALUES[0], "input_ids": PROMPTS[0, 1:]}, r"must be \[1, 10, 32\] or \[10, 32\]"),
        ({"lm_head": VALUES}, r"must be \[2, 11, 263\], not \[2, 11, 32\]"),
        ({NAME: VALUES.astype(np.int32)}, "must be float16, float32, float64, or bfloat16 as"),
        ({NAME: VALUES.astype(np.complex64)}, "not complex64"),
        ({NAME: VALUES.astype(ml_dtypes.float8_e4m3fn)}, "or bfloat16 as uint16, not void8"),
        ({NAME: VALUES.astype(object)}, "holds pickled Python objects, which are not read"),
        ({NAME: with_value(np.nan)}, "embed_tokens. is nan at prompt 1, position 2, element 3"),
        ({NAME: with_value(-np.inf)}, "is -inf at prompt 1"),
        ({NAME: with_value(1e39, np.float64)}, r"is 1e\+39 at prompt 1"),
        ({"model.layers.2.mlp": VALUES}, "no activation of this model, whose layers are 0 to 1"),
        ({"model.layers.1.attn": VALUES}, r"did you mean model\.layers\.1"),
        ({"model.layers.0.self_attn.q_proj": VALUES}, "no activation of this model"),
        ({"attention_mask": PROMPTS}, "name arrays after Hugging Face's modules, such as model"),
        ({"x" * 10_000: VALUES}, "no activation of this model"),
        ({"\n": VALUES}, "no activation of this model"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)
def test_what_does_not_fit_the_model_is_refused(arrays, said, tmp_path):
    with pytest.raises(MeshwenError, match=said) as error:
        read_arrays(tmp_path, **arrays)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_a_file_without_tokens_is_refused(tmp_path):
    with pytest.raises(MeshwenError, match="has no input_ids, the tokens that were fed"):
        read(save(tmp_path, {NAME: VALUES}))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"is no \.npz file \(File is not a zip file\)"),
        (b"PK\5\6" + bytes(18), "has no input_ids"),
        (np.array([1]).tobytes(), r"is no \.npz file"),
    ],
)
def test_a_file_that_is_no_archive_is_refused(content, said, tmp_path):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(MeshwenError, match=said):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["none.npz", "."])
def test_a_file_that_cannot_be_read_is_refused(name, tmp_path):
    with pytest.raises(MeshwenError, match="cannot read"):
        read(tmp_path / name)


def archive(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(shape, dtype="<f4"):
    file = io.BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()


IDS = ("input_ids.npy", npy(PROMPTS))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([(f"{NAME}.npy", header(SHAPE))], "has 0 bytes, not the 2816 of float32"),
        ([(f"{NAME}.npy", npy(VALUES) + b"\0")], "has 2817 bytes, not the 2816"),
        ([(f"{NAME}.npy", header((1 << 40, 11, 32)))], r"not \[1099511627776, 11, 32\]"),
        ([(f"{NAME}.npy", header((-2, -11, 32)))], r"not \[-2, -11, 32\]"),
        ([(f"{NAME}.npy", b"no array")], "is no array of numpy's"),
        ([(f"{NAME}.npy", b"")], "is no array of numpy's"),
        ([(f"{NAME}.npy", b"\x93NUMPY\3\0" + bytes(10))], "is no array of numpy's"),
        ([(f"{NAME}.npy", b"\x93NUMPY\2\0\xff\xff\xff\xff")], "is no array of numpy's"),
        ([(f"{NAME}.npy", npy(VALUES))] * 2, "is there twice"),
        ([(f"{NAME}.npy", npy(VALUES)), (NAME, b"")], "is there twice"),
    ],
    ids=lambda value: "" if isinstance(value, list) else None,
)
def test_arrays_that_are_none_are_refused(members, said, tmp_path):
    with pytest.raises(MeshwenError, match=said):
        read(archive(tmp_path / "a.npz", [IDS, *members]))


def test_other_compression_is_refused(tmp_path):
    path = archive(tmp_path / "a.npz", [IDS, (f"{NAME}.npy", npy(VALUES))], zipfile.ZIP_LZMA)
    with pytest.raises(MeshwenError, match="compressed in a way that numpy does not use"):
        read(path)


def test_a_small_file_does_not_unpack_to_a_large_array(tmp_path, monkeypatch):
    members = [IDS, (f"{NAME}.npy", header(SHAPE) + bytes(1 << 26))]
    path = archive(tmp_path / "a.npz", members)
    taken = []
    read_member = zipfile.ZipExtFile.read
    monkeypatch.setattr(
        zipfile.ZipExtFile, "read", lambda self, n=-1: taken.append(n) or read_member(self, n)
    )
    with pytest.raises(MeshwenError, match="not the 2816"):
        read(path)
    assert all(0 <= n <= 1 << 14 for n in taken)


def test_zipped_zeros_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    """They have the right shape."""
    ids = np.zeros((1, 1100), np.int64)
    shape = (1, 1100, D)
    zeros = np.zeros(shape, np.float64).tobytes()
    names = [name for name in modules(mesh_run("1").runner.model.weights) if name != "lm_head"]
    monkeypatch.setattr(activation_file, "_MOST_UNPACKED", len(zeros))
    members = [(f"{name}.npy", header(shape, "<f8") + zeros) for name in names]
    path = archive(tmp_path / "a.npz", [("input_ids.npy", npy(ids)), *members])
    with pytest.raises(MeshwenError, match=r"unpacks from .* to .*, more than 16 times as much"):
        read(path)
    save(tmp_path, {"input_ids": ids} | {name: np.zeros(shape) for name in names}, "plain.npz")
    assert len(read(tmp_path / "plain.npz").values) == len(names)


def test_a_prompt_that_would_be_too_large_in_float64_is_refused(tmp_path, monkeypatch):
    arrays = {"lm_head": np.zeros((*PROMPTS.shape, V), np.float32)}
    monkeypatch.setattr(activation_file, "MOST_PER_PROMPT", 8 * 11 * V)
    assert LOGITS in read_arrays(tmp_path, **arrays).values
    monkeypatch.setattr(activation_file, "MOST_PER_PROMPT", 8 * 11 * V - 1)
    with pytest.raises(MeshwenError, match=f'"lm_head" has 11 x {V} numbers .* most 10 tokens'):
        read_arrays(tmp_path, **arrays)


def test_damage_is_noticed(tmp_path):
    path = archive(tmp_path / "a.npz", [IDS, (f"{NAME}.npy", npy(VALUES))], zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[-400] ^= 1
    path.write_bytes(data)
    with pytest.raises(MeshwenError, match="Bad CRC-32"):
        read(path)
