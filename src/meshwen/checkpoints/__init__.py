# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of every format behind one interface: `open_checkpoint`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from meshwen.checkpoints.base import Checkpoint, TensorSource, read_json
from meshwen.checkpoints.gguf import config_dict, generation_dict, read_gguf
from meshwen.checkpoints.hub import download, looks_like_hub_id
from meshwen.checkpoints.safetensors import find_safetensors, read_safetensors
from meshwen.checkpoints.torch_bin import find_torch, read_torch
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
    if path.is_file():
        return _open_file(path, name, load_format)
    return _open_folder(path, name, load_format)


def _open_file(path: Path, name: str, load_format: str) -> Checkpoint:
    if path.suffix == ".gguf" and load_format in ("auto", "gguf"):
        return _open_gguf(path, name)
    if path.suffix == ".safetensors" and load_format in ("auto", "safetensors"):
        return _open_safetensors(path.parent, name, {path: set()})
    raise MeshwenError(
        f"cannot open the file {path} with load format {load_format}: pass a .gguf file, a "
        ".safetensors file or a model folder"
    )


def _open_folder(folder: Path, name: str, load_format: str) -> Checkpoint:
    if load_format in ("auto", "safetensors") and (shards := find_safetensors(folder)):
        return _open_safetensors(folder, name, shards)
    if load_format in ("auto", "torch") and (shards := find_torch(folder)):
        return _open_torch(folder, name, shards)
    if load_format in ("auto", "gguf") and (files := sorted(folder.glob("*.gguf"))):
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise MeshwenError(f"{folder} has several GGUF files, pass the path of one: {names}")
        return _open_gguf(files[0], name)
    kinds = "safetensors, torch .bin or GGUF" if load_format == "auto" else load_format
    raise MeshwenError(
        f"{folder} holds no {kinds} weights: check the path; a download may be unfinished"
    )


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
        on_close=files.close,
    )


def _open_torch(folder: Path, name: str, shards: dict[Path, set[str]]) -> Checkpoint:
    config = replace(Qwen2Config.from_json(folder), name=name)
    tensors = read_torch(shards)
    return Checkpoint(
        name=name,
        path=folder,
        format="torch",
        config=config,
        generation_config=_generation_config(folder),
        tensors=tensors,
        tokenizer_files=folder,
        on_close=tensors.clear,
    )


def _open_gguf(path: Path, name: str) -> Checkpoint:
    metadata, tensors, file = read_gguf(path)
    try:
        config = Qwen2Config.from_dict(config_dict(metadata, tensors), name=name)
    except MeshwenError as error:
        raise MeshwenError(f"{path}: {error}") from None
    return Checkpoint(
        name=name,
        path=path,
        format="gguf",
        config=config,
        generation_config=generation_dict(metadata),
        tensors=tensors,
        tokenizer_files=metadata,
        on_close=file.close,
    )


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}
