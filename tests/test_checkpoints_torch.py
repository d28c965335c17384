# SPDX-License-Identifier: Apache-2.0
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_writers import random_weights, same_bits, unhurried, write_folder, write_json
from meshwen.checkpoints import open_checkpoint
from meshwen.common.extras import how_to_install
from meshwen.errors import MeshwenError

NAME = "model.layers.0.mlp.down_proj.weight"


pytestmark = pytest.mark.torch


def error_of(path: Path, **options: str) -> str:
    with pytest.raises(MeshwenError) as caught:
        open_checkpoint(str(path), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_torch_says_what_to_install(tmp_path, monkeypatch):
    (write_folder(tmp_path) / "pytorch_model.bin").write_bytes(b"PK")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert error_of(tmp_path).endswith(how_to_install("torch"))


def torch_state(torch: object, weights: dict[str, np.ndarray]) -> dict[str, object]:
    bits = {name: torch.from_numpy(array.view(np.int16)) for name, array in weights.items()}
    return {name: tensor.view(torch.bfloat16) for name, tensor in bits.items()}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="needs the extra torch")


@pytest.fixture(scope="module")
def opened(torch, tmp_path_factory):
    weights = random_weights()
    folder = write_folder(tmp_path_factory.mktemp("bin"))
    torch.save(torch_state(torch, weights), folder / "pytorch_model.bin")
    return open_checkpoint(str(folder)), weights


def test_single_file_gives_every_tensor_bit_for_bit(opened):
    checkpoint, weights = opened
    assert checkpoint.format == "torch"
    assert checkpoint.tensors.keys() == weights.keys()
    for name, source in checkpoint.tensors.items():
        assert (source.name, source.shape) == (name, weights[name].shape)
        assert source.dtype == ml_dtypes.bfloat16
        assert same_bits(source.read(), weights[name])


bounds = st.none() | st.integers(-100, 100)
slices = st.builds(slice, bounds, bounds)


@unhurried
@given(slices, slices)
def test_a_slice_read_is_that_slice_of_the_whole(opened, rows, columns):
    checkpoint, weights = opened
    assert same_bits(checkpoint.tensors[NAME].read((rows, columns)), weights[NAME][rows, columns])


def test_every_bfloat16_pattern_survives_nan_payloads_included(torch, tmp_path):
    patterns = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    state = torch_state(torch, {"x": patterns.view(ml_dtypes.bfloat16)})
    torch.save(state, write_folder(tmp_path) / "pytorch_model.bin")
    read = open_checkpoint(str(tmp_path)).tensors["x"].read()
    np.testing.assert_array_equal(read.view(np.uint16), patterns)


def test_other_types_and_parameters_are_read_as_they_are(torch, tmp_path):
    state = {
        "half": torch.ones(2, 3, dtype=torch.float16),
        "integer": torch.arange(6),
        "bool": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3)),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
    }
    torch.save(state, write_folder(tmp_path) / "pytorch_model.bin")
    tensors = open_checkpoint(str(tmp_path)).tensors
    for name, tensor in state.items():
        assert same_bits(tensors[name].read(), tensor.detach().numpy())


def test_sharded_checkpoint_is_one_mapping_and_a_lost_tensor_is_named(torch, tmp_path):
    weights = random_weights()
    weight_map = {}
    for i in range(2):
        part = {name: weights[name] for name in list(weights)[i::2]}
        shard = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save(torch_state(torch, part), write_folder(tmp_path) / shard)
        weight_map |= dict.fromkeys(part, shard)
    write_json(tmp_path / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    assert open_checkpoint(str(tmp_path)).tensors.keys() == weights.keys()
    torch.save({}, tmp_path / weight_map[NAME])
    assert weight_map[NAME] in error_of(tmp_path)


def test_safetensors_go_before_torch_unless_asked(torch, tmp_path):
    weights = random_weights()
    folder = write_folder(tmp_path, weights)
    torch.save(torch_state(torch, weights), folder / "pytorch_model.bin")
    assert open_checkpoint(str(folder)).format == "safetensors"
    assert open_checkpoint(str(folder), load_format="torch").format == "torch"


class Payload:
    """Runs code when it is unpickled by anything but the safe unpickler."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.marker,))


def test_code_in_a_pickle_does_not_run(torch, tmp_path):
    marker = tmp_path / "ran"
    torch.save({"x": Payload(marker)}, write_folder(tmp_path) / "pytorch_model.bin")
    assert "cannot be loaded as torch weights" in error_of(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_truncated_file_is_refused(torch, tmp_path, keep):
    path = write_folder(tmp_path) / "pytorch_model.bin"
    torch.save({"x": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    assert "cannot be loaded as torch weights" in error_of(tmp_path)


def test_what_is_not_a_supported_tensor_is_named(torch, tmp_path):
    path = write_folder(tmp_path) / "pytorch_model.bin"
    for value, described in (
        (3, "int"),
        (torch.zeros(2, dtype=torch.complex64), "torch.complex64"),
    ):
        torch.save({"x": value}, path)
        assert f'"x" is {described}' in error_of(tmp_path)
    torch.save([torch.zeros(2)], path)
    assert "holds no state dict" in error_of(tmp_path)


def rewritten(path: Path, change: object, **options: int) -> None:
    """Writes an archive again, each record as `change(name, content)` has it; None: without it."""
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in records:
            if (new := change(name, content)) is not None:
                archive.writestr(name, new)


def is_numbers(name: str) -> bool:
    return name.split("/", 1)[1].startswith("data/")


# What a record of numbers is made, and how the archive is compressed.
CHANGES = {
    "emptied": lambda name, content: b"" if is_numbers(name) else content,
    "shortened": lambda name, content: content[:-4] if is_numbers(name) else content,
    "lengthened": lambda name, content: content + bytes(64) if is_numbers(name) else content,
    "left out": lambda name, content: None if name.endswith("data/0") else content,
}


@pytest.mark.parametrize("change", CHANGES)
def test_numbers_that_are_not_what_the_tensors_are_made_of_are_refused(torch, tmp_path, change):
    path = write_folder(tmp_path) / "pytorch_model.bin"
    torch.save({"x": torch.arange(100.0), "y": torch.arange(60.0)}, path)
    rewritten(path, lambda name, content: content)
    assert open_checkpoint(str(tmp_path)).tensors["y"].read()[59] == 59
    rewritten(path, CHANGES[change])
    assert str(path) in error_of(tmp_path)


def test_tensors_that_share_numbers_are_read(torch, tmp_path):
    x = torch.arange(100.0).reshape(20, 5)
    state = {"x": x, "again": x, "rows": x[3:7], "none": torch.zeros(0, 4)}
    state["no rows"] = torch.arange(8.0).reshape(2, 4)[:0]
    torch.save(state, write_folder(tmp_path) / "pytorch_model.bin")
    tensors = open_checkpoint(str(tmp_path)).tensors
    for name, tensor in state.items():
        assert same_bits(tensors[name].read(), tensor.numpy())


def test_what_only_looks_like_a_tensor_of_numbers_is_named(torch, tmp_path):
    path = write_folder(tmp_path) / "pytorch_model.bin"
    wrong = {
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.zeros(3, device="meta"),
        "repeated": torch.zeros(1).expand(1 << 20, 1 << 20),
    }
    for name, value in wrong.items():
        torch.save({name: value}, path)
        assert f'"{name}"' in error_of(tmp_path)
    torch.save({("a", 1): torch.zeros(3)}, path)
    assert "is no name of a tensor" in error_of(tmp_path)
