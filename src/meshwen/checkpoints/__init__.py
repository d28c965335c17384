# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of every format behind one interface: `open_checkpoint`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from meshwen import demo
from meshwen.checkpoints.base import Checkpoint, TensorSource, quantized_hint, with_model_prefix
from meshwen.checkpoints.dimensions import check_dimensions
from meshwen.checkpoints.generation_config import check_generation_config
from meshwen.checkpoints.gguf import MAGIC, read_gguf
from meshwen.checkpoints.gguf_config import generation_dict, metadata_notes, read_metadata
from meshwen.checkpoints.hub import download
from meshwen.checkpoints.names import name_kind
from meshwen.checkpoints.safetensors import find_safetensors, read_safetensors
from meshwen.checkpoints.torch_bin import find_torch, read_torch
from meshwen.common.choices import LOAD_FORMATS, check_choice
from meshwen.common.json_files import read_json, shown
from meshwen.common.paths import user_path
from meshwen.errors import MeshwenError
from meshwen.models.config import ModelConfig
from meshwen.models.config_json import config_file, declared_quantization, read_config
from meshwen.models.presets import preset
from meshwen.models.registry import config_from_dict

__all__ = [
    "Checkpoint",
    "TensorSource",
    "name_kind",
    "open_checkpoint",
]


def open_checkpoint(
    name: str, *, load_format: str = "auto", revision: str | None = None
) -> Checkpoint:
    """Opens a checkpoint without reading its weights.

    Args:
        name: a Hugging Face model folder, a GGUF file of any name (or a folder with one .gguf
            file), a .safetensors file beside its config.json, a hub id `organisation/name`,
            "demo" for the embedded demo model, or, with `load_format="dummy"`, a preset such as
            "qwen2.5-7b".
        load_format: "safetensors", "torch" or "gguf" to insist on one; "auto" takes the first of
            these that a folder holds; "dummy" looks for no weights, and downloads none: the
            checkpoint then has no tensors, and its format is None.
        revision: branch, tag or commit, for a hub id.

    Raises MeshwenError, in one line, when there is nothing to open, when a file is missing or
    corrupt, and when the architecture is not supported.
    """
    check_choice("load_format", load_format, LOAD_FORMATS)
    try:
        return _open(name, load_format, revision)
    except OSError as error:  # Such as a folder that may not be entered.
        raise MeshwenError(f"cannot read {error.filename or name}: {error.strerror}") from None


def _open(name: str, load_format: str, revision: str | None) -> Checkpoint:
    kind = name_kind(name)
    if kind != "hub" and revision is not None:
        raise MeshwenError(
            f"a revision ({revision!r}) is for a hub id, and {name} is a {kind}: leave it out"
        )
    if revision is not None and not revision.strip():
        raise MeshwenError("the revision is empty: leave it out for the newest")
    if kind == "preset":
        return _open_preset(name, load_format)
    if kind == "hub":
        folder = download(name, load_format=load_format, revision=revision)
        return _open_folder(folder, name, load_format)
    path = demo.path() if name == "demo" else user_path(name)
    if path.is_file():
        return _open_file(path, load_format)
    # A link's own name, not that of what it leads to.
    return _open_folder(path, _text(os.path.basename(os.path.abspath(path))), load_format)


def _text(name: str) -> str:
    """A name that can be written to a file: bytes that are no UTF-8 escaped."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _open_preset(name: str, load_format: str) -> Checkpoint:
    if load_format != "dummy":
        raise MeshwenError(
            f"{name} is a published size, without weights: pass a model folder or a hub id such as "
            "Qwen/Qwen2.5-0.5B-Instruct, or --load-format dummy for random weights"
        )
    config = preset(name)
    return Checkpoint(
        name=config.name,
        path=None,
        format=None,
        config=config,
        generation_config={},
        tensors={},
        tokenizer_files=None,
    )


def _open_file(path: Path, load_format: str) -> Checkpoint:
    name, suffix = _text(path.stem), path.suffix.lower()
    if load_format in ("auto", "gguf", "dummy") and (suffix == ".gguf" or _begins_as_gguf(path)):
        return _open_gguf(path, name, load_format)
    if suffix == ".safetensors" and load_format == "dummy":
        return _open_config(path.parent, name)
    if suffix == ".safetensors" and load_format in ("auto", "safetensors"):
        return _open_tensors(path.parent, name, "safetensors", {path: set()})
    raise MeshwenError(
        f"cannot open the file {path} with load format {load_format}: pass a .gguf file, a "
        ".safetensors file or a model folder"
    )


def _begins_as_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _open_folder(folder: Path, name: str, load_format: str) -> Checkpoint:
    if load_format in ("auto", "safetensors") and (shards := find_safetensors(folder)):
        return _open_tensors(folder, name, "safetensors", shards)
    if load_format in ("auto", "torch") and (shards := find_torch(folder)):
        return _open_tensors(folder, name, "torch", shards)
    files = sorted(file for file in folder.glob("[!.]*") if file.suffix.lower() == ".gguf")
    if load_format == "dummy" and ((folder / "config.json").is_file() or not files):
        return _open_config(folder, name)
    if load_format in ("auto", "gguf", "dummy") and files:
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise MeshwenError(f"{folder} has several GGUF files, pass the path of one: {names}")
        return _open_gguf(files[0], name, load_format)
    kinds = "safetensors, torch .bin or GGUF" if load_format == "auto" else load_format
    raise MeshwenError(
        f"{folder} holds no {kinds} weights: check the path; a download may be unfinished"
    )


def _open_config(folder: Path, name: str) -> Checkpoint:
    """A folder without its weights, and with a tokenizer only if there is one."""
    has_tokenizer = any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json"))
    config, quantization = _read_config(folder, name)
    return Checkpoint(
        name=name,
        path=folder,
        format=None,
        config=config,
        generation_config=_generation_config(folder),
        tensors={},
        tokenizer_files=folder if has_tokenizer else None,
        quantization=quantization,
        notes=_quantization_notes(quantization),
    )


def _open_tensors(
    folder: Path,
    name: str,
    load_format: Literal["safetensors", "torch"],
    shards: dict[Path, set[str]],
) -> Checkpoint:
    config, quantization = _read_config(folder, name)
    with _naming_quantization(quantization):
        read = read_safetensors if load_format == "safetensors" else read_torch
        tensors, files = read(shards)
    tensors = with_model_prefix(tensors)
    if load_format == "torch":  # It unmaps a file when nothing refers to it any more.
        files.callback(tensors.clear)
    nbytes = sum(path.stat().st_size for path in shards)
    check_dimensions(config, tensors, nbytes, folder / "config.json")
    return Checkpoint(
        name=name,
        path=folder,
        format=load_format,
        config=config,
        generation_config=_generation_config(folder),
        tensors=tensors,
        tokenizer_files=folder,
        quantization=quantization,
        notes=_quantization_notes(quantization),
        on_close=files.close,
    )


def _open_gguf(path: Path, name: str, load_format: str) -> Checkpoint:
    metadata, tensors, file = read_gguf(path)
    config = read_metadata(path, metadata, tensors, name, len(file))
    return Checkpoint(
        name=name,
        path=path,
        format=None if load_format == "dummy" else "gguf",
        config=config,
        generation_config=check_generation_config(generation_dict(metadata), str(path)),
        tensors={} if load_format == "dummy" else tensors,
        tokenizer_files=metadata,
        notes=metadata_notes(metadata),
        on_close=file.close,
    )


def _read_config(folder: Path, name: str) -> tuple[ModelConfig, str | None]:
    """The config of a folder, and what quantisation it names."""
    file = config_file(folder)
    data = read_config(file)
    return config_from_dict(data, name=name, where=str(file)), declared_quantization(data)


@contextmanager
def _naming_quantization(quantization: str | None) -> Iterator[None]:
    """Adds to an error that the config names a quantisation."""
    try:
        yield
    except MeshwenError as error:
        if quantization is None:
            raise
        raise MeshwenError(f"{error}; {quantized_hint(quantization)}") from None


def _quantization_notes(quantization: str | None) -> tuple[str, ...]:
    if quantization is None:
        return ()
    return (
        f"config.json's quantization_config ({shown(quantization)}) is ignored: weights are "
        "taken as whole floating-point numbers",
    )


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    # A link that leads nowhere is no absent file: what it would say is missed.
    config = read_json(path, dict[str, Any]) if os.path.lexists(path) else {}
    return check_generation_config(config, str(path))
