# SPDX-License-Identifier: Apache-2.0
"""Safetensors files, single or sharded: views of the mapped file, bit for bit.

The safetensors library validates a file (sizes, gaps, overlaps, known dtypes); the tensors are then
viewed in a mapping of our own, because the library copies every slice that it hands out. To write a
file, it wants all of its tensors in memory at once: `write_safetensors` has one at a time there.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from meshwen.checkpoints.base import (
    MappedFile,
    MappedTensor,
    TensorSource,
    join_shards,
    shard_files,
)
from meshwen.common.json_files import parse_json
from meshwen.common.units import bytes_text
from meshwen.errors import MeshwenError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_LARGEST_HEADER = 1 << 24  # bytes: a thousand times that of Qwen2.5-72B, whose 963 tensors it names
_LONGEST_REASON = 200  # characters: the library repeats what it has read
# transformers wants to be told that the layout is PyTorch's.
_OF_PYTORCH: Mapping[str, str] = {"format": "pt"}
_ALIGNMENT = 8  # bytes of a header, so that what follows it may be mapped
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def find_safetensors(folder: Path) -> dict[Path, set[str]] | None:
    """The safetensors files of a folder, each with the tensors that its index promises.

    `model.safetensors` goes before an index, as in transformers; a single file of another name will
    do. None when there are none; raises MeshwenError when several lack an index.
    """
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: set()}
    if (folder / INDEX).is_file():
        return shard_files(folder / INDEX)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise MeshwenError(f"{folder} has several safetensors files and no {INDEX}: {names}")
    return {file: set() for file in files} or None


def read_safetensors(
    shards: dict[Path, set[str]],
) -> tuple[dict[str, TensorSource], ExitStack]:
    """The tensors of all files by name, and what closes the files.

    Raises MeshwenError naming the file, and the tensor where there is one, when a file is truncated
    or corrupt, lacks a tensor that the index promises, or has a dtype that numpy cannot show.
    """
    files = ExitStack()
    return join_shards(shards, lambda path: read_file(path, files)[0]), files


def read_file(path: Path, files: ExitStack) -> tuple[dict[str, TensorSource], Any]:
    """The tensors of one file by name, and the metadata of its header: any JSON, None without any.

    Raises MeshwenError as `read_safetensors`.

    Args:
        path: the file.
        files: gets what closes it.
    """
    file = MappedFile(path)
    files.callback(file.close)
    header_bytes = int.from_bytes(file.buffer[:8], "little")
    if _LARGEST_HEADER < header_bytes <= len(file):
        raise MeshwenError(
            f"{path} has a header of {bytes_text(header_bytes)}, above "
            f"{_LARGEST_HEADER >> 20} MiB: download it again"
        )
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise MeshwenError(
            f"{path} is not a whole safetensors file ({_one_line(error)}): download it again"
        ) from None
    header = parse_json(file.bytes_at(8, header_bytes).tobytes(), f"the header of {path}")
    metadata = header.pop("__metadata__", None)
    tensors: dict[str, TensorSource] = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in _DTYPES:
            raise MeshwenError(
                f"{path}: {name} has dtype {entry['dtype']}, which is not supported; "
                f"use a checkpoint in {', '.join(list(_DTYPES)[:4])}"
            )
        start, stop = entry["data_offsets"]
        tensors[name] = MappedTensor(
            name=name,
            shape=tuple(entry["shape"]),
            dtype=_DTYPES[entry["dtype"]],
            nbytes=stop - start,
            file=file,
            offset=8 + header_bytes + start,
        )
    return tensors, metadata


def write_safetensors(
    path: Path, tensors: Sequence[TensorSource], metadata: Mapping[str, str] = _OF_PYTORCH
) -> None:
    """Writes a new file of tensors, one after the other, and has it on the disk.

    Args:
        path: the file.
        tensors: read one at a time, in order.
        metadata: for the header.

    Raises:
        OSError: it is there, or cannot be written.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(np.ascontiguousarray(tensor.read()).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _one_line(error: Exception) -> str:
    line = " ".join(str(error).split())
    return line if len(line) <= _LONGEST_REASON else f"{line[: _LONGEST_REASON - 3]}..."
