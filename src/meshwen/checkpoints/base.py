# SPDX-License-Identifier: Apache-2.0
"""What every checkpoint format offers the loader: a config, and tensors read slice by slice."""

import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import numpy as np
from annotated_types import MinLen
from typing_extensions import TypedDict

from meshwen.common.json_files import read_json, shown
from meshwen.errors import MeshwenError
from meshwen.models.config import ModelConfig
from meshwen.weights.source import Index, TensorSource

_LONGEST_NAME = 255  # bytes, of a file in a folder


class MappedFile:
    """A file mapped read-only, which keeps few of its pages in this process.

    Pages of a mapped file count as memory of the process while they are mapped, so reading a whole
    checkpoint would count it twice. `bytes_at` therefore lets go of the pages handed out before.
    Arrays made of them stay valid: the system brings the pages back when they are touched.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise MeshwenError(f"{path} is empty: download it again") from None
        except OSError as error:
            raise MeshwenError(f"cannot read {path}: {error.strerror}") from None
        self._before = (0, 0)

    def __len__(self) -> int:
        return len(self.buffer)

    def bytes_at(self, offset: int, nbytes: int) -> np.ndarray:
        """`nbytes` bytes of the file from `offset`, uint8 `[nbytes]`, without a copy."""
        span = (offset, nbytes)
        if span != self._before:
            self._release(*self._before)
            self._before = span
        return np.frombuffer(self.buffer, np.uint8, nbytes, offset)

    def _release(self, offset: int, nbytes: int) -> None:
        if nbytes and hasattr(mmap, "MADV_DONTNEED"):
            start = offset - offset % mmap.PAGESIZE
            self.buffer.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)

    def close(self) -> None:
        """Unmaps the file, or leaves that to the last array which still shows it."""
        try:
            self.buffer.close()
        except BufferError:
            self._release(*self._before)


@dataclass(frozen=True, kw_only=True, eq=False)
class MappedTensor(TensorSource):
    """A tensor that lies in a mapped file, row-major, in a dtype that numpy knows."""

    file: MappedFile
    offset: int

    def read(self, index: Index = ()) -> np.ndarray:
        """A read-only view of the file: nothing is copied, not even for a slice of columns."""
        data = self.file.bytes_at(self.offset, self.nbytes)
        return data.view(self.dtype).reshape(self.shape)[index]


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """An open checkpoint; a context manager, or call `close`.

    Attributes:
        name: what to call the model: the hub id, or the name of the folder or file.
        path: the folder, or the GGUF file; None for a preset.
        format: "safetensors", "torch" or "gguf"; None when opened without weights.
        config: the model's dimensions.
        generation_config: the content of `generation_config.json`, or what a GGUF file says in its
            place, under the same names; {} when there is none.
        tensors: what the files hold, by Hugging Face name, in file order. Nothing is added for tied
            embeddings and nothing is left out.
        tokenizer_files: the folder with the tokenizer's files; for GGUF, the file's metadata; None
            when opened without weights where there is no tokenizer either.
        quantization: what the config says that the weights were quantised by; they are read as
            if they were not, and do not fit the config if they are.
        notes: what a user should know about how the files are taken.
    """

    name: str
    path: Path | None
    format: str | None
    config: ModelConfig
    generation_config: dict[str, Any]
    tensors: Mapping[str, TensorSource]
    tokenizer_files: Path | Mapping[str, Any] | None
    quantization: str | None = None
    notes: tuple[str, ...] = ()
    on_close: Callable[[], None] = lambda: None

    @property
    def misfit_hint(self) -> str | None:
        """Why the tensors may not fit the config, if anything is known."""
        return None if self.quantization is None else quantized_hint(self.quantization)

    def close(self) -> None:
        """Lets go of the files. Arrays that were read stay valid."""
        self.on_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def quantized_hint(quantization: str) -> str:
    """What to do where weights are quantised in a way that is not read."""
    return (
        f"config.json's quantization_config names {shown(quantization)}, which is not supported: "
        "use the unquantised checkpoint or a GGUF file"
    )


def with_model_prefix(tensors: dict[str, TensorSource]) -> dict[str, TensorSource]:
    """The tensors under the names of a whole model: a base model saved alone lacks `model.`."""
    if "model.embed_tokens.weight" in tensors or "embed_tokens.weight" not in tensors:
        return tensors
    renamed = {name: name if name.startswith("lm_head.") else f"model.{name}" for name in tensors}
    return {renamed[name]: replace(source, name=renamed[name]) for name, source in tensors.items()}


class ShardIndex(TypedDict):
    """What `model.safetensors.index.json` and its like must hold: the file of each tensor."""

    weight_map: Annotated[dict[str, str], MinLen(1)]


def shard_files(index_path: Path) -> dict[Path, set[str]]:
    """The shards that a Hugging Face index file names, each with the tensors it must hold.

    Raises MeshwenError when the index is malformed or a shard is not there.
    """
    weight_map = read_json(index_path, ShardIndex)["weight_map"]
    shards: dict[Path, set[str]] = {}
    for tensor, file_name in weight_map.items():
        if Path(file_name).name != file_name or len(os.fsencode(file_name)) > _LONGEST_NAME:
            raise MeshwenError(
                f"{index_path} puts {shown(tensor)} in {shown(file_name)}: a shard must be a file "
                "in the same folder"
            )
        shards.setdefault(index_path.parent / file_name, set()).add(tensor)
    for shard, tensors in shards.items():
        if not shard.is_file():
            raise MeshwenError(
                f"{shard} is missing: {index_path.name} says that it holds {shown(min(tensors))} "
                f"and {len(tensors) - 1} other tensors; download it"
            )
    return shards


def join_shards(
    shards: Mapping[Path, set[str]], read_shard: Callable[[Path], Mapping[str, TensorSource]]
) -> dict[str, TensorSource]:
    """All tensors of all shards. Raises MeshwenError when one is missing or is there twice."""
    tensors: dict[str, TensorSource] = {}
    home: dict[str, Path] = {}
    for shard, expected in shards.items():
        found = read_shard(shard)
        # A tied head is in some programs' index alone; one that is needed is missed later.
        if missing := expected - found.keys() - {"lm_head.weight"}:
            raise MeshwenError(
                f"{shard} does not hold {shown(min(missing))}, which the index says it does"
                f" ({len(missing)} missing): download the shard and the index again"
            )
        for name, source in found.items():
            if name in tensors:
                raise MeshwenError(
                    f"{shown(name)} is both in {home[name]} and in {shard.name}: remove one of them"
                )
            tensors[name], home[name] = source, shard
    return tensors
