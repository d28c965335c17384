# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders: what is in them, and that they are whole or not there."""

import errno
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoint_writers import CONFIG, random_weights, same_bits, write_folder, write_json
from mesh_model import MemoryTensor
from meshwen.checkpoints import open_checkpoint
from meshwen.checkpoints.writing import write_checkpoint
from meshwen.common.units import bytes_number, bytes_or_share
from meshwen.errors import MeshwenError

TEXTS = {"config.json": json.dumps(CONFIG), "tokenizer.json": "{}"}


def tensors(weights: dict[str, np.ndarray]) -> dict[str, MemoryTensor]:
    return {
        name: MemoryTensor(name=name, shape=a.shape, dtype=a.dtype, nbytes=a.nbytes, array=a)
        for name, a in weights.items()
    }


def write(folder: Path, weights=None, most: int = 10**9, **options) -> dict[str, np.ndarray]:
    weights = random_weights() if weights is None else weights
    write_checkpoint(folder, TEXTS, tensors(weights), max_shard_bytes=most, **options)
    return weights


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_one_file_is_read_by_the_library_and_by_us(tmp_path, dtype):
    folder = tmp_path / "new" / "model"
    weights = write(folder, random_weights(dtype=dtype))
    assert names(folder) == {"config.json", "tokenizer.json", "model.safetensors"}
    found = load_file(folder / "model.safetensors")
    with open_checkpoint(str(folder)) as opened:
        assert list(opened.tensors) == list(weights)
        for name, array in weights.items():
            assert same_bits(found[name], array)
            assert same_bits(np.array(opened.tensors[name].read()), array)


def test_shards_hold_at_most_so_many_bytes_and_a_larger_tensor_is_alone(tmp_path):
    """The embedding has 6,400 bytes, an MLP's matrix 12,288."""
    weights = write(tmp_path, most=10_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(a.nbytes for a in weights.values())}
    assert list(index["weight_map"]) == list(weights)
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, 9)]
    for file in files:
        held = load_file(tmp_path / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(held)
        assert len(held) == 1 or sum(array.nbytes for array in held.values()) <= 10_000
    with open_checkpoint(str(tmp_path)) as opened:
        for name, array in weights.items():
            assert same_bits(np.array(opened.tensors[name].read()), array)


@pytest.mark.parametrize("file", ["config.json", "vocab.json", "model.safetensors"])
def test_a_folder_with_a_part_of_a_checkpoint_is_refused_and_stays(tmp_path, file):
    (tmp_path / file).write_text("old")
    with pytest.raises(MeshwenError, match=f'has files of a checkpoint \\("{file}"\\).*overwrite'):
        write(tmp_path)
    assert names(tmp_path) == {file}
    assert (tmp_path / file).read_text() == "old"


def test_to_overwrite_replaces_the_whole_checkpoint_and_nothing_else(tmp_path):
    write(tmp_path, most=10_000)
    (tmp_path / "README.md").write_text("mine")
    write_json(tmp_path / "special_tokens_map.json", {"eos_token": "x"})
    weights = write(tmp_path, random_weights(seed=1), overwrite=True)
    expected = {"config.json", "tokenizer.json", "model.safetensors", "README.md"}
    assert names(tmp_path) == expected
    found = load_file(tmp_path / "model.safetensors")
    assert all(same_bits(found[name], array) for name, array in weights.items())


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "file",
    ["other-Q4.gguf", "adapter_model.safetensors", "model-1.safetensors", "pytorch_model.bin"],
)
def test_other_weights_are_never_deleted_but_refused(tmp_path, file, overwrite):
    write(tmp_path)
    (tmp_path / file).write_text("other")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(MeshwenError, match=f'has other weights \\("{file}"\\), .* another folder'):
        write(tmp_path, random_weights(seed=1), overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shards_of_any_name_are_replaced_where_the_index_names_them(tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    index = {"weight_map": dict.fromkeys(random_weights(), "part.safetensors")}
    write_json(tmp_path / "model.safetensors.index.json", index)
    write(tmp_path, overwrite=True)
    assert names(tmp_path) == {"config.json", "tokenizer.json", "model.safetensors"}


@pytest.mark.parametrize("place", ["../mine.safetensors", "notes.txt", 5])
def test_what_is_no_shard_is_not_deleted_whatever_an_index_says(tmp_path, place):
    folder = tmp_path / "model"
    write(folder)
    mine = [tmp_path / "mine.safetensors", folder / "notes.txt"]
    for file in mine:
        file.write_text("mine")
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"x": place}})
    write(folder, overwrite=True)
    assert [file.read_text() for file in mine] == ["mine", "mine"]
    assert not (folder / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "vocab.json", "model-00001-of-00002.safetensors"]
)
def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_is_deleted(tmp_path, name):
    write(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    before = names(tmp_path)
    with pytest.raises(MeshwenError, match=f"{name} is a folder, where a checkpoint has a file"):
        write(tmp_path, random_weights(seed=1), overwrite=True)
    assert names(tmp_path) == before


class Full:
    """A disk that is full when so many files were written."""

    def __init__(self, after: int):
        self.left = after

    def fsync(self, descriptor: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("after", [0, 1, 2])
def test_of_a_checkpoint_that_the_disk_cannot_hold_nothing_is_left(tmp_path, monkeypatch, after):
    monkeypatch.setattr(os, "fsync", Full(after).fsync)
    with pytest.raises(MeshwenError, match=r"cannot write .*model: No space left on device$"):
        write(tmp_path / "model")
    assert names(tmp_path) == set()


def test_the_old_checkpoint_stays_where_the_disk_cannot_hold_the_new_one(tmp_path, monkeypatch):
    weights = write(tmp_path)
    monkeypatch.setattr(os, "fsync", Full(1).fsync)
    with pytest.raises(MeshwenError, match="No space left"):
        write(tmp_path, random_weights(seed=1), overwrite=True)
    assert names(tmp_path) == {"config.json", "tokenizer.json", "model.safetensors"}
    found = load_file(tmp_path / "model.safetensors")
    assert all(same_bits(found[name], array) for name, array in weights.items())


@pytest.mark.parametrize("moved", range(4))
def test_where_moving_is_interrupted_there_is_no_checkpoint(tmp_path, monkeypatch, moved):
    """Ctrl-C after so many of three files, `config.json` among them only in the end."""
    write_folder(tmp_path, random_weights())
    replace, done = Path.replace, []

    def interrupted(self, target):
        if len(done) == moved:
            raise KeyboardInterrupt
        done.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    if moved == 3:
        write(tmp_path, random_weights(seed=1), overwrite=True)
        assert done[-1].name == "config.json"
        return
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, random_weights(seed=1), overwrite=True)
    with pytest.raises(MeshwenError):
        open_checkpoint(str(tmp_path))


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(MeshwenError, match=r"cannot write .*model: File exists$"):
        write(tmp_path / "model")


@pytest.mark.parametrize(
    ("given", "expected"),
    [(1, 1), (10**12, 10**12), ("5GB", 5 * 10**9), ("2 MiB", 2**21), ("3kb", 3000)],
)
def test_numbers_of_bytes_are_read_as_transformers_does(given, expected):
    assert bytes_number("x", given) == expected


@pytest.mark.parametrize("given", [0, -1, True, 1.5, None, "5", "GB", "5TB", "-5GB", "0GB", ""])
def test_what_is_no_number_of_bytes_is_refused(given):
    with pytest.raises(MeshwenError, match=r'^x must be a number of bytes, or text such as "5GB"'):
        bytes_number("x", given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        *(("4GB", 4 * 10**9), (" 512MiB ", 2**29), (1, 1), (np.int32(7), 7)),
        *(("50%", 0.5), ("12.5 %", 0.125), ("100%", 1.0), ("0.5", 0.5), (".25", 0.25)),
        *(("1.0", 1.0), (0.5, 0.5), (1.0, 1.0), (np.float32(0.5), 0.5)),
    ],
)
def test_an_amount_of_memory_is_bytes_or_a_share(given, expected):
    found = bytes_or_share("x", given)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    "given",
    [
        *(0, -1, True, 1.5, 0.0, -0.5, float("nan"), float("inf"), None, [], b"4GB"),
        *("5", "1", "1.5", "0.0", "0%", "101%", "-5%", "%", "5TB", "", "half"),
    ],
)
def test_what_is_no_amount_of_memory_is_refused(given):
    with pytest.raises(MeshwenError, match=r'^x must be bytes, such as "4GB", or a share of the'):
        bytes_or_share("x", given)
