# SPDX-License-Identifier: Apache-2.0
"""pytorch_model.bin checkpoints, single or sharded, through torch's own safe unpickler."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from meshwen.checkpoints.base import Index, TensorSource, join_shards, shard_files
from meshwen.checkpoints.torch_zip import Record, read_records
from meshwen.common.extras import how_to_install
from meshwen.common.json_files import shown
from meshwen.errors import MeshwenError

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"

_DTYPES = {
    "torch.float64": np.dtype(np.float64),
    "torch.float32": np.dtype(np.float32),
    "torch.float16": np.dtype(np.float16),
    "torch.bfloat16": np.dtype(ml_dtypes.bfloat16),
    "torch.int64": np.dtype(np.int64),
    "torch.int32": np.dtype(np.int32),
    "torch.int16": np.dtype(np.int16),
    "torch.int8": np.dtype(np.int8),
    "torch.uint8": np.dtype(np.uint8),
    "torch.bool": np.dtype(np.bool_),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class TorchTensor(TensorSource):
    """A tensor that torch has mapped from the file."""

    tensor: Any

    def read(self, index: Index = ()) -> np.ndarray:
        """A view of the mapped file; bfloat16 passes as bits, since torch gives numpy none."""
        import torch

        part = self.tensor[index]
        if part.dtype == torch.bfloat16:
            return part.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return part.numpy()


def find_torch(folder: Path) -> dict[Path, set[str]] | None:
    """The torch files of a folder, each with the tensors that its index promises, or None."""
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: set()}
    return shard_files(folder / INDEX) if (folder / INDEX).is_file() else None


def read_torch(shards: Mapping[Path, set[str]]) -> tuple[dict[str, TensorSource], ExitStack]:
    """The tensors of all files by name, and what closes the files.

    Raises MeshwenError when torch is missing, when a file is corrupt, of the format before torch
    1.6 or holds more than tensors, and when it lacks a tensor that the index promises.
    """
    return join_shards(shards, _read_file), ExitStack()


def _read_file(path: Path) -> dict[str, TensorSource]:
    try:
        import torch
    except ImportError:
        raise MeshwenError(
            f"{path} needs torch: use a checkpoint in safetensors, or {how_to_install('torch')}"
        ) from None
    records = read_records(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a corrupt pickle can raise anything
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MeshwenError(
            f"{path} cannot be loaded as torch weights ({first_line}): download it again, or "
            "convert it to safetensors"
        ) from error
    if not isinstance(state, Mapping):
        raise MeshwenError(f"{path} holds no state dict but a {type(state).__name__}")
    sources = {name: _source(path, name, value) for name, value in state.items()}
    _check_storages(path, sources, records)
    return dict(sources)


def _source(path: Path, name: Any, value: Any) -> TorchTensor:
    if not isinstance(name, str):
        raise MeshwenError(f"{path}: {shown(name)} is no name of a tensor: download it again")
    dtype = str(getattr(value, "dtype", type(value).__name__))
    if dtype not in _DTYPES:
        raise MeshwenError(
            f"{path}: {shown(name)} is {dtype}, which is not supported; use a checkpoint in "
            f"{', '.join(kind.removeprefix('torch.') for kind in list(_DTYPES)[:4])}"
        )
    if problem := _unlike_plain(value):
        raise MeshwenError(f"{path}: {shown(name)} {problem}; use a checkpoint of plain tensors")
    return TorchTensor(
        name=name,
        shape=tuple(value.shape),
        dtype=_DTYPES[dtype],
        nbytes=value.nbytes,
        tensor=value.detach(),
    )


def _unlike_plain(value: Any) -> str | None:
    """What is unusual about a tensor, None where it is numbers that lie in memory."""
    import torch

    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"is a {type(value).__name__}"
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_neg():
        return f"is {value.layout} on {value.device}, and no plain tensor"
    if value.nbytes > value.untyped_storage().nbytes():
        return f"repeats {value.untyped_storage().nbytes()} bytes as {list(value.shape)}"
    return None


def _check_storages(path: Path, sources: Mapping[str, TorchTensor], records: list[Record]) -> None:
    """Holds what torch has mapped against the file's directory, which torch does not look at.

    Both are the same pieces of memory, counted from the first, or a record is not as long as the
    numbers that are made of it.
    """
    storages = [source.tensor.untyped_storage() for source in sources.values()]
    mapped = sorted({(piece.data_ptr(), piece.nbytes()) for piece in storages if piece.nbytes()})
    same = len(mapped) == len(records) and all(
        (at - mapped[0][0], nbytes) == (record.offset - records[0].offset, record.nbytes)
        for (at, nbytes), record in zip(mapped, records, strict=True)
    )
    if not same:
        raise MeshwenError(
            f"{path}: its {len(records)} records of numbers ({sum(r.nbytes for r in records)} "
            f"bytes) are not what its {len(mapped)} tensors are made of "
            f"({sum(nbytes for _, nbytes in mapped)} bytes): download it again"
        )
