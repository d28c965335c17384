# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders in Hugging Face's layout, and single files: whole or not there."""

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from meshwen.checkpoints.base import TensorSource, shard_files
from meshwen.checkpoints.safetensors import INDEX, SINGLE, write_safetensors
from meshwen.common.json_files import shown, to_json
from meshwen.common.paths import exists, user_path
from meshwen.errors import MeshwenError

CONFIG = "config.json"  # Without it, a folder is a checkpoint to nobody.
# A checkpoint's own files, which another one replaces; so do the shards that its index names.
_OWN = (
    *(CONFIG, "generation_config.json", SINGLE, INDEX, f"model-{'[0-9]' * 5}-of-*.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    "additional_chat_templates/*.jinja",
)
# Weights that programs would take for a part of the new checkpoint, where they are not its own.
_WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json", "*.gguf"),
    *("pytorch_model*.bin", "pytorch_model*.bin.index.json"),
)


def write_checkpoint(
    folder: str | os.PathLike[str],
    texts: Mapping[str, str],
    tensors: Mapping[str, TensorSource],
    *,
    max_shard_bytes: int,
    overwrite: bool = False,
) -> None:
    """Writes a folder that Hugging Face's programs and `open_checkpoint` read.

    All is written beside its place, in the folder itself, and moved there at the end, `config.json`
    last: an interrupted call leaves no checkpoint, or with `overwrite` the old one or none.

    Args:
        folder: made if it is missing. Other files stay.
        texts: files beside the weights by name; among them `config.json`.
        tensors: read one at a time, in order.
        max_shard_bytes: of tensors in a file; a larger tensor has a file for itself.
        overwrite: replace the files of a checkpoint that is there: config, the safetensors of this
            layout or of its index, tokenizer.

    Raises:
        MeshwenError: there is a checkpoint, or a part of one; there are other weights, or a folder
            in the place of a file, also with `overwrite`; or a file cannot be written.
    """
    path = user_path(folder)
    try:
        old = _own_files(path)
        _check_free(path, old)
        if old and not overwrite:
            raise MeshwenError(
                f"{path} has files of a checkpoint ({shown(old[0].name)}"
                f"{f' and {len(old) - 1} more' if old[1:] else ''}): choose another folder, or "
                "give overwrite=True"
            )
        _write(path, old, texts, _shards(tensors, max_shard_bytes))
    except OSError as error:  # Such as a full disk.
        raise MeshwenError(f"cannot write {path}: {error.strerror}") from None


def write_file(
    path: Path, tensors: Sequence[TensorSource], metadata: Mapping[str, str], *, overwrite: bool
) -> None:
    """Writes one safetensors file, which is whole or not there; or, interrupted, the old one.

    Args:
        path: the file, in a folder that is there.
        tensors: read one at a time, in order.
        metadata: for its header.
        overwrite: replace a file that is there.

    Raises:
        MeshwenError: `check_new_file` refuses it, or it cannot be written.
    """
    check_new_file(path, overwrite=overwrite)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as folder:
            unfinished = Path(folder) / path.name
            write_safetensors(unfinished, tensors, metadata)
            unfinished.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise MeshwenError(f"cannot write {path}: {error.strerror}") from None


def check_new_file(path: Path, *, overwrite: bool) -> None:
    """Refuses a file that may not be written, before there is anything to write.

    Raises:
        MeshwenError: it is there and not to be replaced, or is a folder or a device, or its folder
            is not there.
    """
    if not exists(path.absolute().parent):
        raise MeshwenError(f"cannot write {path}: its folder does not exist")
    if exists(path) and not path.is_file():
        raise MeshwenError(f"cannot write {path}: it is no regular file")
    if exists(path) and not overwrite:
        raise MeshwenError(f"{path} exists: choose another name, or give overwrite=True")


def _write(
    folder: Path,
    old: Iterable[Path],
    texts: Mapping[str, str],
    shards: Mapping[str, list[TensorSource]],
) -> None:
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as name:
            unfinished = Path(name)
            for file, tensors in shards.items():
                write_safetensors(unfinished / file, tensors)
            for file, text in {**texts, **_index(shards)}.items():
                _write_text(unfinished / file, text)
            _move(unfinished, folder, old)
    except BaseException:
        if made:
            with suppress(OSError):  # It is not empty where moving failed.
                folder.rmdir()
        raise


def _move(unfinished: Path, folder: Path, old: Iterable[Path]) -> None:
    """Puts a whole checkpoint in the place of the old one's files."""
    for file in sorted(old, key=lambda path: path.name != CONFIG):
        file.unlink()
    for file in unfinished.iterdir():
        if file.name != CONFIG:
            file.replace(folder / file.name)
    _sync(folder)
    (unfinished / CONFIG).replace(folder / CONFIG)
    _sync(folder)


def _sync(folder: Path) -> None:
    """Has the names in a folder on the disk, where the system offers it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _own_files(folder: Path) -> list[Path]:
    """The files of the checkpoint in a folder, or of a part of one."""
    shards: set[Path] = set()
    if (folder / INDEX).is_file():
        with suppress(MeshwenError):  # Files that a damaged index does not name are not its own.
            shards = {f for f in shard_files(folder / INDEX) if f.suffix == ".safetensors"}
    matching = [file for pattern in _OWN for file in sorted(folder.glob(pattern))]
    return matching + sorted(shards.difference(matching))


def _check_free(folder: Path, own: Sequence[Path]) -> None:
    """Raises MeshwenError where something must not be deleted, and may not stay either."""
    for file in own:
        if file.is_dir() and not file.is_symlink():
            raise MeshwenError(f"{file} is a folder, where a checkpoint has a file: move it away")
    for pattern in _WEIGHTS:
        for file in sorted(folder.glob(pattern)):
            if file not in own and not file.is_dir():
                raise MeshwenError(
                    f"{folder} has other weights ({shown(file.name)}), which could be taken for a "
                    "part of the checkpoint and are not overwritten: choose another folder, or "
                    "move them away"
                )


def _shards(tensors: Mapping[str, TensorSource], most: int) -> dict[str, list[TensorSource]]:
    """The tensors of each file, by its name."""
    shards: list[list[TensorSource]] = [[]]
    free = most
    for tensor in tensors.values():
        if tensor.nbytes > free and shards[-1]:
            shards.append([])
            free = most
        shards[-1].append(tensor)
        free -= tensor.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    stem, suffix = SINGLE.split(".")
    return {
        f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}": shard
        for number, shard in enumerate(shards, 1)
    }


def _index(shards: Mapping[str, list[TensorSource]]) -> dict[str, str]:
    """The file that says which tensor is in which shard; {} for one shard."""
    if len(shards) == 1:
        return {}
    size = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    places = {tensor.name: file for file, shard in shards.items() for tensor in shard}
    index = {"metadata": {"total_size": size}, "weight_map": places}
    return {INDEX: to_json(index, indent=2)}


def _write_text(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
