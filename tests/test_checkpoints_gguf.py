# SPDX-License-Identifier: Apache-2.0
import struct
import sys
import tracemalloc
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_writers import (
    CONFIG,
    SHAPES,
    float_gguf_tensors,
    random_weights,
    same_bits,
    unhurried,
    write_folder,
    write_gguf,
)
from meshwen.checkpoints import open_checkpoint
from meshwen.common.extras import how_to_install
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError
from meshwen.models.parallel_model import ParallelModel
from meshwen.models.qwen2 import Qwen2Config
from meshwen.models.registry import MODEL_TYPES
from meshwen.parallel.mesh import make_mesh
from meshwen.tokenizer.tokenizer import Tokenizer
from meshwen.weights.loading import load_params

EMBEDDING = ("token_embd.weight", (np.zeros((CONFIG["vocab_size"], 64), np.float32), None))
NAME = "model.layers.0.mlp.down_proj.weight"
ROWS, COLUMNS = 70, 1024  # more than one chunk of rows


def error_of(path: Path, **options: str) -> str:
    with pytest.raises(MeshwenError) as caught:
        open_checkpoint(str(path), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def scale_and_min(packed: np.ndarray, j: int) -> tuple[int, int]:
    """The 6-bit scale and minimum of sub-block j of a K block, as ggml's get_scale_min_k4."""
    q = [int(byte) for byte in packed]
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 15) | (q[j - 4] >> 6 << 4), (q[j + 4] >> 4) | (q[j] >> 6 << 4)


def f16(packed: np.ndarray) -> float:
    return float(packed.view(np.float16)[0])


def q8_0(b: np.ndarray) -> list[float]:
    return [f16(b[:2]) * int(q) for q in b[2:].view(np.int8)]


def q4_0(b: np.ndarray) -> list[float]:
    quants = [int(q) & 15 for q in b[2:]] + [int(q) >> 4 for q in b[2:]]
    return [f16(b[:2]) * (q - 8) for q in quants]


def q5_0(b: np.ndarray) -> list[float]:
    high = int(b[2:6].view(np.uint32)[0])
    quants = [int(q) & 15 for q in b[6:]] + [int(q) >> 4 for q in b[6:]]
    return [f16(b[:2]) * ((q | (high >> i & 1) << 4) - 16) for i, q in enumerate(quants)]


def q4_k(b: np.ndarray) -> list[float]:
    values = []
    for j in range(8):
        scale, minimum = scale_and_min(b[4:16], j)
        for q in b[16 + j // 2 * 32 :][:32]:
            quant = int(q) >> 4 if j % 2 else int(q) & 15
            values.append(f16(b[:2]) * scale * quant - f16(b[2:4]) * minimum)
    return values


def q5_k(b: np.ndarray) -> list[float]:
    values = []
    for j in range(8):
        scale, minimum = scale_and_min(b[4:16], j)
        for q, high in zip(b[48 + j // 2 * 32 :][:32], b[16:48], strict=True):
            quant = (int(q) >> 4 if j % 2 else int(q) & 15) + (int(high) >> j & 1) * 16
            values.append(f16(b[:2]) * scale * quant - f16(b[2:4]) * minimum)
    return values


def q6_k(b: np.ndarray) -> list[float]:
    values = []
    scales, d = b[192:208].view(np.int8), f16(b[208:210])
    for i in range(256):
        half, part, at = i // 128, i % 128 // 32, i % 32
        low = int(b[half * 64 + part % 2 * 32 + at]) >> (part // 2 * 4) & 15
        high = int(b[128 + half * 32 + at]) >> (part * 2) & 3
        values.append(d * int(scales[i // 16]) * ((low | high << 4) - 32))
    return values


REFERENCES = {"Q8_0": q8_0, "Q4_0": q4_0, "Q5_0": q5_0, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}
F16_AT = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(kind: str) -> np.ndarray:
    """Random packed rows, uint8 [ROWS, bytes], with scales that are finite."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(7)
    blocks = rng.integers(0, 256, (ROWS * COLUMNS // elements, nbytes), dtype=np.uint8)
    for at in F16_AT.get(kind, (0,)):
        scales = rng.uniform(0.01, 1, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks


@pytest.fixture(scope="module", params=sorted(REFERENCES))
def quantised(request, tmp_path_factory):
    kind = request.param
    blocks = random_blocks(kind)
    packed = (blocks.reshape(ROWS, -1), gguf.GGMLQuantizationType[kind])
    path = tmp_path_factory.mktemp(kind) / "x.gguf"
    write_gguf(path, dict([EMBEDDING, ("blk.0.ffn_down.weight", packed)]))
    source = open_checkpoint(str(path)).tensors[NAME]
    return kind, blocks, source, source.read()


def test_block_formats_follow_their_definition(quantised):
    kind, blocks, source, whole = quantised
    assert source.quantization == kind
    assert source.shape == (ROWS, COLUMNS)
    assert source.dtype == whole.dtype == np.float32
    assert source.nbytes == blocks.size
    expected = [value for block in blocks[-64:] for value in REFERENCES[kind](block)]
    np.testing.assert_allclose(whole.reshape(-1)[-len(expected) :], expected, rtol=1e-6, atol=1e-5)


bounds = st.none() | st.integers(-COLUMNS - 9, COLUMNS + 9)
slices = st.builds(slice, bounds, bounds, st.none() | st.sampled_from([1, 2, 3, -1]))


@unhurried
@given(slices, slices)
def test_a_slice_read_is_that_slice_of_the_whole(quantised, rows, columns):
    *_, source, whole = quantised
    assert same_bits(source.read((rows, columns)), whole[rows, columns])


def test_only_the_covering_blocks_are_dequantised(quantised):
    _, _, source, whole = quantised
    seen = []

    def dequantize(packed: np.ndarray) -> np.ndarray:
        seen.append(packed.size)
        return source.dequantize(packed)

    fields = {name: getattr(source, name) for name in source.__dataclass_fields__}
    spied = type(source)(**(fields | {"dequantize": dequantize}))
    start = 3 * source.block_elements + 1
    part = spied.read((slice(2, 5), slice(start, start + source.block_elements)))
    assert same_bits(part, whole[2:5, start : start + source.block_elements])
    if source.block_elements * 5 <= COLUMNS:
        assert sum(seen) == 3 * 2 * source.block_bytes


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS"])
def test_other_block_formats_are_the_packages_own(tmp_path, kind):
    type_ = gguf.GGMLQuantizationType[kind]
    elements, nbytes = gguf.GGML_QUANT_SIZES[type_]
    packed = np.full((2, 512 // elements * nbytes), 0x21, np.uint8)
    path = write_gguf(tmp_path / "x.gguf", dict([EMBEDDING, ("output.weight", (packed, type_))]))
    source = open_checkpoint(str(path)).tensors["lm_head.weight"]
    assert source.quantization == kind
    assert same_bits(source.read(), gguf.quants.dequantize(packed, type_))


@pytest.mark.parametrize(
    ("dtype", "raw_type"),
    [(np.float32, None), (np.float16, None), (ml_dtypes.bfloat16, "BF16")],
)
def test_float_types_are_views_bit_for_bit(tmp_path, dtype, raw_type):
    values = np.random.default_rng(0).standard_normal((5, 7)).astype(dtype)
    stored = values.view(np.uint8) if raw_type else values
    entry = (stored, gguf.GGMLQuantizationType[raw_type] if raw_type else None)
    path = write_gguf(tmp_path / "x.gguf", dict([EMBEDDING, ("output.weight", entry)]))
    source = open_checkpoint(str(path)).tensors["lm_head.weight"]
    assert source.quantization is None
    assert same_bits(source.read(), values)
    assert same_bits(source.read((slice(1, 3), slice(2, 6))), values[1:3, 2:6])
    assert not source.read().flags.owndata


def test_every_tensor_has_its_hugging_face_name(tmp_path):
    weights = random_weights(0, np.float32)
    with open_checkpoint(str(write_gguf(tmp_path / "x.gguf", float_gguf_tensors()))) as checkpoint:
        assert checkpoint.tensors.keys() == SHAPES.keys()
        for name, source in checkpoint.tensors.items():
            assert same_bits(source.read(), weights[name])


def test_config_is_that_of_config_json(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", float_gguf_tensors())
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.config == Qwen2Config.from_dict(CONFIG | {"torch_dtype": "float32"})
    assert checkpoint.format == "gguf"
    assert checkpoint.name == checkpoint.config.name == "tiny"
    assert checkpoint.path == path


def test_a_file_without_a_head_is_tied_and_reports_only_what_it_has(tmp_path):
    tensors = float_gguf_tensors()
    del tensors["output.weight"]
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", tensors)))
    assert checkpoint.config.tie_word_embeddings
    assert "lm_head.weight" not in checkpoint.tensors


def test_unknown_tensor_keeps_its_name(tmp_path):
    tensors = float_gguf_tensors() | {"blk.0.odd.weight": (np.ones(4, np.float32), None)}
    path = write_gguf(tmp_path / "x.gguf", tensors)
    assert "blk.0.odd.weight" in open_checkpoint(str(path)).tensors


def test_metadata_is_plain_python_for_the_tokenizer(tmp_path):
    tokens = ["a", "Ġé", "<|endoftext|>", "<|im_end|>"]

    def extra(writer: object) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([1, 1, 3, 3])
        writer.add_token_merges(["a b", "Ġ é"])
        writer.add_eos_token_id(3)
        writer.add_bos_token_id(2)
        writer.add_pad_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_chat_template("{{ messages }}")

    path = write_gguf(tmp_path / "x.gguf", float_gguf_tensors(), extra=extra)
    checkpoint = open_checkpoint(str(path))
    metadata = checkpoint.tokenizer_files
    assert metadata["tokenizer.ggml.tokens"] == tokens
    assert metadata["tokenizer.ggml.token_type"] == [1, 1, 3, 3]
    assert metadata["tokenizer.ggml.merges"] == ["a b", "Ġ é"]
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert checkpoint.config.eos_token_id == (3,)
    assert checkpoint.config.bos_token_id == checkpoint.config.pad_token_id == 2
    assert checkpoint.generation_config == {"eos_token_id": [3, 2]}


@pytest.mark.parametrize(("temperature", "sampled"), [(0.7, True), (0.0, False)])
def test_sampling_settings_have_their_effect(tmp_path, temperature, sampled):
    def extra(writer: object) -> None:
        writer.add_float32("general.sampling.temp", temperature)
        writer.add_int32("general.sampling.top_k", 20)

    path = write_gguf(tmp_path / "x.gguf", float_gguf_tensors(), extra=extra)
    found = open_checkpoint(str(path)).generation_config
    assert found == {"temperature": temperature, "top_k": 20, "do_sample": sampled}
    assert SamplingParams.from_generation_config(found).temperature == temperature


def test_every_metadata_type_is_read(tmp_path):
    kinds = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float64")

    def extra(writer: object) -> None:
        for kind in kinds:
            getattr(writer, f"add_{kind}")(f"x.{kind}", 7)
        writer.add_array("x.array", [1.5, 2.5])

    path = write_gguf(tmp_path / "x.gguf", float_gguf_tensors(), extra=extra)
    metadata = open_checkpoint(str(path)).tokenizer_files
    assert [metadata[f"x.{kind}"] for kind in kinds] == [7] * len(kinds)
    assert metadata["x.array"] == [1.5, 2.5]


def test_yarn_scaling_has_transformers_names(tmp_path):
    def extra(writer: object) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    path = write_gguf(tmp_path / "x.gguf", float_gguf_tensors(), extra=extra)
    scaling = open_checkpoint(str(path)).config.rope_scaling
    assert (scaling.rope_type, scaling.factor) == ("yarn", 4.0)
    assert scaling.original_max_position_embeddings == 32


def test_scaling_without_a_counterpart_is_refused(tmp_path):
    def extra(writer: object) -> None:
        writer.add_float32("qwen2.rope.scaling.attn_factor", 0.5)

    path = write_gguf(tmp_path / "x.gguf", float_gguf_tensors(), extra=extra)
    assert "qwen2.rope.scaling.attn_factor" in error_of(path)


def test_a_folder_with_one_gguf_opens_it_and_with_two_lists_them(tmp_path):
    write_gguf(tmp_path / "a.gguf", float_gguf_tensors())
    assert open_checkpoint(str(tmp_path)).path == tmp_path / "a.gguf"
    assert open_checkpoint(str(tmp_path), load_format="gguf").name == tmp_path.name
    write_gguf(tmp_path / "b.gguf", float_gguf_tensors())
    assert "a.gguf, b.gguf" in error_of(tmp_path)


def test_safetensors_go_before_gguf_unless_asked(tmp_path):
    write_folder(tmp_path, random_weights())
    write_gguf(tmp_path / "a.gguf", float_gguf_tensors())
    assert open_checkpoint(str(tmp_path)).format == "safetensors"
    assert open_checkpoint(str(tmp_path), load_format="gguf").format == "gguf"


def test_another_architecture_is_refused(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", float_gguf_tensors(), architecture="llama")
    message = error_of(path)
    assert message == (
        f'{path}: its architecture is "llama", which is not supported; supported: '
        + ", ".join(MODEL_TYPES)
    )


def test_impossible_alignment_is_refused(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", float_gguf_tensors(), extra=_zero_alignment)
    assert "general.alignment is 0" in error_of(path)


def _zero_alignment(writer: object) -> None:
    writer.add_uint32("general.alignment", 0)


def test_a_split_file_is_refused(tmp_path):
    path = tmp_path / "x-00001-of-00003.gguf"
    write_gguf(path, float_gguf_tensors(), extra=lambda w: w.add_uint16("split.count", 3))
    assert "one of 3 parts" in error_of(path)


@pytest.mark.parametrize("type_", [gguf.GGMLQuantizationType.IQ1_S, gguf.GGMLQuantizationType.I32])
def test_unsupported_type_names_tensor_and_type(tmp_path, type_):
    elements, nbytes = gguf.GGML_QUANT_SIZES[type_]
    packed = np.zeros((2, 512 // elements * nbytes), np.uint8)
    path = write_gguf(tmp_path / "x.gguf", dict([EMBEDDING, ("output.weight", (packed, type_))]))
    message = error_of(path)
    assert f'"output.weight" has type {type_.name}' in message


def test_missing_gguf_package_says_what_to_install(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "x.gguf", float_gguf_tensors())
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert error_of(path).endswith(how_to_install("gguf"))


def test_truncation_at_any_point_is_refused(tmp_path):
    tensors = dict([EMBEDDING, ("output_norm.weight", (np.ones(8, np.float32), None))])
    extra = lambda writer: writer.add_token_list(["a", "b", "c"])  # noqa: E731
    whole = write_gguf(tmp_path / "x.gguf", tensors, extra=extra).read_bytes()
    path = tmp_path / "cut.gguf"
    header_end = whole.index(b"output_norm.weight") + 64
    last_byte = whole.rindex(struct.pack("<f", 1.0)) + 3
    for size in [*range(header_end), last_byte]:
        path.write_bytes(whole[:size])
        assert str(path) in error_of(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"not a gguf file", "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 0x1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 0x3000000"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 1), "not a whole GGUF file"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, (1 << 64) - 1) + b"x" * 64, "not a whole"),
        (b"GGUF" + struct.pack("<IQQQsII", 3, 0, 1, 1, b"k", 9, 8) + b"\xff" * 64, "not a whole"),
        (b"GGUF" + struct.pack("<IQQQsI", 3, 0, 1, 1, b"k", 99), "not a whole GGUF file"),
        (b"GGUF" + struct.pack("<IQQQsIQs", 3, 0, 1, 1, b"k", 8, 9, b"v"), "ends inside a string"),
    ],
)
def test_corrupt_header_is_refused(tmp_path, content, expected):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert expected in error_of(path)


@pytest.mark.real
@pytest.mark.slow
def test_real_gguf_rounds_to_the_real_safetensors(real_model_dir):
    file = real_model_dir.with_name(f"{real_model_dir.name}.gguf")
    with open_checkpoint(str(real_model_dir)) as expected, open_checkpoint(str(file)) as found:
        assert found.tensors.keys() == expected.tensors.keys()
        assert found.config.rms_norm_eps == expected.config.rms_norm_eps
        assert found.generation_config["eos_token_id"] == expected.generation_config["eos_token_id"]
        for name, source in expected.tensors.items():
            for start in range(0, source.shape[0], 40_000):
                index = (slice(start, start + 40_000),)
                rounded = found.tensors[name].read(index).astype(ml_dtypes.bfloat16)
                assert same_bits(rounded, source.read(index)), name


# Metadata that is not as the model needs it, and what the refusal says.
WRONG = {
    "a text for a count": (("string", "qwen2.block_count", "1"), "expected an integer"),
    "a float for a count": (("float32", "qwen2.context_length", 128.0), "expected an integer"),
    "a list for a number": (("array", "qwen2.rope.freq_base", [1.0]), "expected a number"),
    "an infinity": (("float32", "qwen2.rope.freq_base", float("inf")), "a finite number"),
    "a number for a list": (("uint32", "tokenizer.ggml.tokens", 3), "expected a list"),
    "a text for a temperature": (("string", "general.sampling.temp", "0"), "expected a number"),
    "a text for an id": (("string", "tokenizer.ggml.eos_token_id", "3"), "expected an integer"),
    "a million layers": (("uint32", "qwen2.block_count", 10**6), "must be from 1 to 4096"),
    "more layers than tensors": (("uint32", "qwen2.block_count", 4000), "15 tensors"),
    "more heads than rows": (("uint32", "qwen2.attention.head_count", 2**14), "qwen2.attention"),
    "a negative eps": (
        ("float32", "qwen2.attention.layer_norm_rms_epsilon", -1e-6),
        "qwen2.attention.layer_norm_rms_epsilon must be from",
    ),
    "part of a head turned": (("uint32", "qwen2.rope.dimension_count", 8), "heads have 16"),
    "no causal mask": (("bool", "qwen2.attention.causal", False), "causal is false"),
}


@pytest.mark.parametrize("case", WRONG)
def test_metadata_of_another_shape_is_refused_by_file_and_key(tmp_path, case):
    (kind, key, value), said = WRONG[case]

    def extra(writer: object) -> None:
        writer.kv_data[-1].pop(key, None)
        getattr(writer, f"add_{kind}")(key, value)

    message = error_of(write_gguf(tmp_path / "x.gguf", float_gguf_tensors(), extra=extra))
    assert message.startswith(str(tmp_path / "x.gguf"))
    assert key in message
    assert said in message


def test_metadata_that_no_computation_needs_blocks_nothing(tmp_path):
    def extra(writer: object) -> None:
        writer.add_uint32("tokenizer.ggml.padding_token_id", 2**32 - 1)
        writer.add_string("tokenizer.ggml.bos_token_id", "none")
        writer.add_array("general.tags", ["a"])
        writer.add_float32("general.odd", float("nan"))
        writer.add_uint32("qwen2.rope.dimension_count", 16)

    path = write_gguf(tmp_path / "x.gguf", float_gguf_tensors(), extra=extra)
    config = open_checkpoint(str(path)).config
    assert (config.pad_token_id, config.bos_token_id) == (None, None)


def test_padding_ids_outside_the_vocabulary_leave_the_tokenizer_as_it_is(tmp_path):
    for number, (kind, value) in enumerate([("uint32", 2**32 - 1), ("uint32", 9), ("string", "x")]):

        def extra(writer: object, kind: str = kind, value: object = value) -> None:
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(["a", "b", "ab", "<|im_end|>"])
            writer.add_token_merges(["a b"])
            writer.add_eos_token_id(3)
            for name in ("padding", "bos"):
                getattr(writer, f"add_{kind}")(f"tokenizer.ggml.{name}_token_id", value)

        path = write_gguf(tmp_path / f"{number}.gguf", float_gguf_tensors(), extra=extra)
        with open_checkpoint(str(path)) as checkpoint:
            tokenizer = Tokenizer.from_checkpoint(checkpoint)
        assert tokenizer.encode("ab<|im_end|>") == [2, 3]
        assert (tokenizer.pad_token_id, tokenizer.eos_token_ids) == (None, (3,))


def test_a_broken_tokenizer_names_its_file(tmp_path):
    path = write_gguf(
        tmp_path / "x.gguf", float_gguf_tensors(), extra=lambda w: w.add_tokenizer_model("gpt2")
    )
    with pytest.raises(MeshwenError, match=r"x\.gguf: .*tokenizer\.ggml\.tokens"):
        Tokenizer.from_checkpoint(open_checkpoint(str(path)))


def test_a_pre_tokenizer_that_is_not_named_is_qwen2s_and_said(tmp_path):
    for number, pre in enumerate([None, "default", "qwen2"]):

        def extra(writer: object, pre: str | None = pre) -> None:
            writer.add_token_list(["a", "b"])
            if pre:
                writer.add_tokenizer_pre(pre)

        path = write_gguf(tmp_path / f"{number}.gguf", float_gguf_tensors(), extra=extra)
        notes = open_checkpoint(str(path)).notes
        assert len(notes) == (pre != "qwen2")


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(*entries: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries)


U32 = struct.pack("<I", 4)
ARRAY_OF_U8, ARRAY_OF_TEXT = struct.pack("<II", 9, 0), struct.pack("<II", 9, 8)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (header(string(b"k") + U32 + bytes(4), string(b"k") + U32 + bytes(4)), "twice"),
        (header(string(b"k") + ARRAY_OF_U8 + struct.pack("<Q", 2**62)), "ends inside an array"),
        (header(string(b"k") + ARRAY_OF_TEXT + struct.pack("<QQ", 2**62, 2**62)), "a string"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 9, 2**62)), "not a whole"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 99, 1) + bytes(9)), "not a whole"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0), "declares 1099511627776 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + string(b"t") + bytes([0, 0, 0, 9]), "dimensions"),
    ],
)
def test_counts_beyond_the_file_size_nothing(tmp_path, content, said):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        assert said in error_of(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_header_of_many_megabytes_is_refused_unread(tmp_path):
    path = tmp_path / "x.gguf"
    with path.open("wb") as file:  # A hole: it takes no room on the disk.
        file.write(header(string(b"k") + struct.pack("<IQ", 8, 1 << 30)))
        file.truncate(1 << 31)
    assert "its header is above 64 MiB" in error_of(path)


def test_a_tensor_elsewhere_than_the_one_before_ends_is_refused(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", float_gguf_tensors())
    content = bytearray(path.read_bytes())
    name = b"blk.0.ffn_down.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8 + 4
    (offset,) = struct.unpack_from("<Q", content, at)
    struct.pack_into("<Q", content, at, offset - 32)
    path.write_bytes(content)
    assert f"begins at byte {offset - 32} of the weights" in error_of(path)


def test_two_tensors_of_one_name_are_refused(tmp_path):
    tensors = float_gguf_tensors() | {"model.norm.weight": (np.ones(64, np.float32), None)}
    path = write_gguf(tmp_path / "x.gguf", tensors)
    assert 'two tensors are "model.norm.weight"' in error_of(path)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_block_whose_scale_is_no_number_is_refused_by_name(tmp_path, quantization):
    tensors = float_gguf_tensors()
    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = gguf.quants.quantize(tensors["blk.0.ffn_down.weight"][0], kind)
    tensors["blk.0.ffn_down.weight"] = (blocks, kind)
    for scale, said in ((1.0, None), (np.nan, "holds NaN"), (np.inf, "holds infinite numbers")):
        blocks[3, :2] = np.array([scale], np.float16).view(np.uint8)
        path = write_gguf(tmp_path / "x.gguf", tensors)
        with open_checkpoint(str(path)) as checkpoint:
            dtype = np.dtype(ml_dtypes.bfloat16)
            model = ParallelModel(checkpoint.config, make_mesh("1"), dtype, "fast", quantization)
            if said is None:
                load_params(checkpoint, model.weights)
                continue
            with pytest.raises(MeshwenError, match=rf"x\.gguf: tensor {NAME} {said}"):
                load_params(checkpoint, model.weights)
