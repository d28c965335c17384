# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of every format behind one interface: `open_checkpoint`."""

from dataclasses import replace
from pathlib import Path

from meshwen.checkpoints.base import Checkpoint, MappedFile, TensorSource, read_json
from meshwen.checkpoints.hub import download, looks_like_hub_id
from meshwen.checkpoints.safetensors import find_safetensors, read_safetensors
from meshwen.config import Qwen2Config
from meshwen.errors import MeshwenError

__all__ = ["LOAD_FORMATS", "Checkpoint", "TensorSource", "open_checkpoint"]

LOAD_FORMATS = ("auto", "safetensors", "torch", "gguf")


def open_checkpoint(
    path_or_id: str, *, load_format: str = "auto", revision: str | None = None
) -> Checkpoint:
    """Opens a checkpoint without reading its weights.

    Args:
        path_or_id: a Hugging Face model folder, a .gguf file (or a folder with one), a .safetensors
            file beside its config.json, or a hub id `organisation/name`.
        load_format: "safetensors", "torch" or "gguf" to insist on one; "auto" takes the first of
            these that a folder holds.
        revision: branch, tag or commit, for a hub id.

    Raises MeshwenError, in one line, when there is nothing to open, when a file is missing or
    corrupt, and when the model is not a Qwen2.
    """
    if load_format not in LOAD_FORMATS:
        raise MeshwenError(
            f"unknown load format {load_format!r}: choose one of {', '.join(LOAD_FORMATS)}"
        )
    path = Path(path_or_id).expanduser()
    name = path.resolve().stem if path.is_file() else path.resolve().name
    if path.exists():
        if revision is not None:
            raise MeshwenError(f"{path} is a path: a revision ({revision!r}) is for a hub id only")
    elif looks_like_hub_id(path_or_id):
        path = download(path_or_id, load_format=load_format, revision=revision)
        name = path_or_id
    else:
        raise MeshwenError(
            f"{path_or_id} does not exist: pass a model folder, a .gguf file, or a hub id such as "
            "Qwen/Qwen2.5-0.5B-Instruct"
        )
    return (
        _open_file(path, name, load_format)
        if path.is_file()
        else _open_folder(path, name, load_format)
    )


def _open_file(path: Path, name: str, load_format: str) -> Checkpoint:
    if path.suffix == ".safetensors" and load_format in ("auto", "safetensors"):
        return _open_safetensors(path.parent, name, {path: set()})
    raise MeshwenError(
        f"cannot open {path} as {load_format}: pass a .gguf file, a .safetensors file or a folder"
    )


def _open_folder(folder: Path, name: str, load_format: str) -> Checkpoint:
    if load_format in ("auto", "safetensors") and (shards := find_safetensors(folder)):
        return _open_safetensors(folder, name, shards)
    kinds = "safetensors, torch .bin or GGUF" if load_format == "auto" else load_format
    raise MeshwenError(f"{folder} holds no {kinds} weights: the download may be unfinished")


def _open_safetensors(folder: Path, name: str, shards: dict[Path, set[str]]) -> Checkpoint:
    config = replace(Qwen2Config.from_json(folder), name=name)
    tensors, files = read_safetensors(shards)
    return Checkpoint(
        name=name,
        path=folder,
        format="safetensors",
        config=config,
        generation_config=_generation_config(folder),
        tensors=tensors,
        tokenizer_files=folder,
        on_close=lambda: _close(files),
    )


def _generation_config(folder: Path) -> dict[str, object]:
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}


def _close(files: list[MappedFile]) -> None:
    for file in files:
        file.close()
