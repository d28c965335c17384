# SPDX-License-Identifier: Apache-2.0
import json
import struct
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from checkpoint_writers import (
    CONFIG,
    SHAPES,
    random_weights,
    same_bits,
    unhurried,
    write_folder,
    write_json,
    write_sharded,
)
from meshwen.checkpoints import open_checkpoint
from meshwen.errors import MeshwenError

NAME = "model.layers.0.mlp.down_proj.weight"


def write_raw(path: Path, header: object, data: bytes) -> None:
    """A safetensors file, byte by byte, so that it can be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def error_of(folder: Path, **options: str) -> str:
    with pytest.raises(MeshwenError) as caught:
        open_checkpoint(str(folder), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_single_file_gives_every_tensor_bit_for_bit(tmp_path):
    weights = random_weights()
    with open_checkpoint(str(write_folder(tmp_path / "tiny", weights))) as checkpoint:
        assert checkpoint.name == checkpoint.config.name == "tiny"
        assert checkpoint.path == checkpoint.tokenizer_files == tmp_path / "tiny"
        assert checkpoint.format == "safetensors"
        assert checkpoint.config.hidden_size == CONFIG["hidden_size"]
        assert checkpoint.generation_config == {}
        assert checkpoint.tensors.keys() == SHAPES.keys()
        for name, source in checkpoint.tensors.items():
            assert source.name == name
            assert source.shape == SHAPES[name]
            assert source.dtype == ml_dtypes.bfloat16
            assert source.quantization is None
            assert same_bits(source.read(), weights[name])


def test_every_bfloat16_pattern_survives_nan_payloads_included(tmp_path):
    patterns = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    folder = write_folder(tmp_path, {"x": patterns.view(ml_dtypes.bfloat16)})
    read = open_checkpoint(str(folder)).tensors["x"].read()
    np.testing.assert_array_equal(read.view(np.uint16), patterns)


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, np.int32, np.uint8, np.bool_]
)
def test_other_dtypes_are_read_as_they_are(tmp_path, dtype):
    values = np.arange(12).reshape(3, 4).astype(dtype)
    folder = write_folder(tmp_path, {"x": values})
    assert same_bits(open_checkpoint(str(folder)).tensors["x"].read(), values)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    weights = random_weights()
    checkpoint = open_checkpoint(str(write_folder(tmp_path_factory.mktemp("slices"), weights)))
    return checkpoint.tensors, weights


bounds = st.none() | st.integers(-100, 100)
slices = st.builds(slice, bounds, bounds)


@unhurried
@given(st.sampled_from(sorted(SHAPES)), slices, slices)
def test_a_slice_read_is_that_slice_of_the_whole(opened, name, rows, columns):
    tensors, weights = opened
    index = (rows, columns)[: weights[name].ndim]
    assert same_bits(tensors[name].read(index), weights[name][index])


def test_reading_copies_nothing_and_outlives_the_checkpoint(tmp_path):
    weights = random_weights()
    with open_checkpoint(str(write_folder(tmp_path, weights))) as checkpoint:
        view = checkpoint.tensors[NAME].read((slice(None), slice(8, 16)))
        assert not view.flags.owndata
        assert not view.flags.writeable
    assert same_bits(view, weights[NAME][:, 8:16])


def test_views_stay_valid_while_other_tensors_are_read(tmp_path):
    weights = random_weights()
    tensors = open_checkpoint(str(write_folder(tmp_path, weights))).tensors
    views = {name: source.read() for name, source in tensors.items()}
    assert all(same_bits(view, weights[name]) for name, view in views.items())


def resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_of_one_tensor_are_let_go_when_the_next_is_read(tmp_path):
    big = np.ones((32, 1 << 20), np.uint8)
    tensors = open_checkpoint(str(write_folder(tmp_path, {"a": big, "b": big}))).tensors
    before = resident_file_bytes()
    view = tensors["a"].read()
    assert view.sum() == big.size
    assert resident_file_bytes() - before > big.size * 3 / 4
    tensors["b"].read()
    assert resident_file_bytes() - before < big.size / 4
    assert view.sum() == big.size


def test_generation_config_is_passed_on(tmp_path):
    folder = write_folder(tmp_path, random_weights())
    write_json(folder / "generation_config.json", {"top_k": 20, "eos_token_id": [1, 2]})
    assert open_checkpoint(str(folder)).generation_config == {"top_k": 20, "eos_token_id": [1, 2]}


def test_sharded_checkpoint_is_one_mapping(tmp_path):
    weights = random_weights()
    checkpoint = open_checkpoint(str(write_sharded(tmp_path, weights, shards=3)))
    assert checkpoint.tensors.keys() == weights.keys()
    assert all(same_bits(checkpoint.tensors[name].read(), weights[name]) for name in weights)


def test_a_tensor_outside_the_index_is_not_lost(tmp_path):
    folder = write_sharded(tmp_path, random_weights())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][NAME]
    write_json(folder / "model.safetensors.index.json", index)
    assert NAME in open_checkpoint(str(folder)).tensors


def test_a_safetensors_file_of_any_name_opens_alone_or_by_its_folder(tmp_path):
    weights = random_weights()
    save_file(weights, write_folder(tmp_path) / "weights.safetensors")
    for path in (tmp_path, tmp_path / "weights.safetensors"):
        assert open_checkpoint(str(path)).tensors.keys() == weights.keys()


def test_missing_shard_is_named(tmp_path):
    folder = write_sharded(tmp_path, random_weights())
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = error_of(folder)
    assert "model-00002-of-00002.safetensors is missing" in message


def test_tensor_that_the_index_promises_and_the_shard_lacks_is_named(tmp_path):
    weights = random_weights()
    folder = write_sharded(tmp_path, weights)
    shard = folder / "model-00001-of-00002.safetensors"
    save_file({name: weights[name] for name in list(weights)[::2] if name != NAME}, shard)
    message = error_of(folder)
    assert NAME in message
    assert shard.name in message


def test_tensor_in_two_shards_is_an_error(tmp_path):
    weights = random_weights()
    folder = write_sharded(tmp_path, weights)
    save_file(weights, folder / "model-00002-of-00002.safetensors")
    assert "both in" in error_of(folder)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ("{", "not valid JSON"),
        ("[]", "index.json: found []; expected an object: download"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"x": "../outside.safetensors"}}', "same folder"),
        ('{"weight_map": {"x": 3}}', "weight_map.x is 3; expected text"),
    ],
)
def test_malformed_index_is_an_error(tmp_path, index, expected):
    (write_folder(tmp_path) / "model.safetensors.index.json").write_text(index)
    message = error_of(tmp_path)
    assert expected in message
    assert "model.safetensors.index.json" in message


def test_several_files_without_an_index_are_listed(tmp_path):
    folder = write_sharded(tmp_path, random_weights())
    (folder / "model.safetensors.index.json").unlink()
    message = error_of(folder)
    assert "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors" in message


def entry(start: int, stop: int, **other: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": [start, stop], **other}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        pytest.param({"x": entry(0, 8)}, b"1234", id="data shorter than the offsets"),
        pytest.param({"x": entry(0, 8)}, b"123456789", id="bytes after the last tensor"),
        pytest.param({"x": entry(0, 8), "y": entry(4, 12)}, b"1" * 12, id="overlap"),
        pytest.param({"x": entry(0, 4), "y": entry(8, 12)}, b"1" * 12, id="gap"),
        pytest.param({"x": entry(0, 8, shape=[3])}, b"1" * 8, id="shape against offsets"),
        pytest.param({"x": entry(0, 8, dtype="F99")}, b"1" * 8, id="unknown dtype"),
        pytest.param(b"not json at all", b"", id="header is not JSON"),
        pytest.param(b"[1, 2]", b"", id="header is not an object"),
    ],
)
def test_corrupt_file_is_refused_by_name(tmp_path, header, data):
    write_raw(write_folder(tmp_path) / "model.safetensors", header, data)
    assert "model.safetensors is not a whole safetensors file" in error_of(tmp_path)


def test_dtype_that_numpy_cannot_show_is_named(tmp_path):
    header = {"x": entry(0, 8, dtype="F8_E4M3", shape=[8])}
    write_raw(write_folder(tmp_path) / "model.safetensors", header, b"1" * 8)
    assert "x has dtype F8_E4M3" in error_of(tmp_path)


def test_truncation_at_any_point_is_refused(tmp_path):
    path = write_folder(tmp_path, {"x": np.arange(8, dtype=np.float32)}) / "model.safetensors"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert str(path) in error_of(tmp_path)


def test_header_length_beyond_the_file_is_refused(tmp_path):
    path = write_folder(tmp_path) / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    assert "not a whole safetensors file" in error_of(tmp_path)


def test_a_tied_head_that_only_the_index_lists_is_not_missed(tmp_path):
    weights = random_weights()
    del weights["lm_head.weight"]
    folder = write_sharded(tmp_path, weights)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first = next(iter(weight_map.values()))
    write_json(index, {"weight_map": weight_map | {"lm_head.weight": first}})
    assert open_checkpoint(str(folder)).tensors.keys() == weights.keys()


def test_a_shard_named_longer_than_a_file_may_be_is_refused(tmp_path):
    write_sharded(tmp_path, random_weights())
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"x": "a" * 10_000}})
    message = error_of(tmp_path)
    assert "model.safetensors.index.json puts" in message
    assert len(message) < 400


def test_a_header_of_many_megabytes_is_refused_unread(tmp_path):
    path = write_folder(tmp_path) / "model.safetensors"
    with path.open("wb") as file:  # A hole: it takes no room on the disk.
        file.write(struct.pack("<Q", 90 << 20))
        file.truncate(100 << 20)
    assert "has a header of 94.4 MB, above 16 MiB" in error_of(tmp_path)


def test_a_generation_config_that_is_a_link_to_nowhere_is_not_passed_over(tmp_path):
    write_folder(tmp_path, random_weights())
    (tmp_path / "generation_config.json").symlink_to(tmp_path / "blob")
    assert "cannot read" in error_of(tmp_path)
