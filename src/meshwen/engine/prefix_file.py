# SPDX-License-Identifier: Apache-2.0
"""Files of a prefix: its token ids, keys and values, in safetensors.

A file says nothing of the mesh, the layout or the block size that it was saved with: keys and
values are those of the model's own heads, a token after the other. Its header says what made them.
It is a stranger's file until all of it has been checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int32
from typing_extensions import TypedDict

from meshwen.checkpoints.base import TensorSource
from meshwen.checkpoints.safetensors import read_file
from meshwen.checkpoints.writing import write_file
from meshwen.common.json_files import check_shape, shown
from meshwen.common.paths import exists
from meshwen.errors import MeshwenError
from meshwen.models.config import ModelConfig
from meshwen.weights.finite import all_finite
from meshwen.weights.source import Index

FORMAT, VERSION = "meshwen-prefix", "1"
_HINT = "save the prefix anew"


@dataclass(frozen=True)
class Prefix:
    """What a KV cache holds of a prefix.

    Attributes:
        token_ids: int32, the T tokens.
        keys, values: of L layers, T tokens, the model's K key/value heads; in the cache's dtype.
        cache_salt: that of the requests which may find it.
    """

    token_ids: Int32[np.ndarray, " T"]
    keys: Float[np.ndarray, "L T K H"]
    values: Float[np.ndarray, "L T K H"]
    cache_salt: str = ""

    @classmethod
    def empty(
        cls,
        token_ids: Int32[np.ndarray, " T"],
        config: ModelConfig,
        dtype: np.dtype[Any],
        salt: str,
    ) -> Self:
        """Of zeros, to be filled."""
        keys, values = (np.zeros(_shape(len(token_ids), config), dtype) for _ in range(2))
        return cls(token_ids, keys, values, salt)

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """All of it, by the names that a file has."""
        return {"token_ids": self.token_ids, "keys": self.keys, "values": self.values}

    @property
    def salt(self) -> bytes:
        """What `Request.salt` is with this `cache_salt`."""
        return self.cache_salt.encode()

    def sha256(self) -> str:
        """Of all of it."""
        digest = hashlib.sha256(self.salt)
        for array in self.tensors.values():
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return digest.hexdigest()


class _Header(TypedDict):
    """What every file's header has, beside what made the prefix."""

    format: str
    version: str
    cache_salt: str
    content_sha256: str


def write_prefix(
    path: Path, prefix: Prefix, made_by: Mapping[str, str], *, overwrite: bool = False
) -> None:
    """Writes a file, which is whole or not there.

    Args:
        path: the file.
        prefix: what it holds.
        made_by: what made the prefix: see `read_prefix`.
        overwrite: replace a file that is there.

    Raises:
        MeshwenError: the prefix holds NaN or infinity, the file is there or cannot be written.
    """
    _check_finite(prefix.tensors, "the prefix")
    header = {
        "format": FORMAT,
        "version": VERSION,
        **made_by,
        "cache_salt": prefix.cache_salt,
        "content_sha256": prefix.sha256(),
    }
    sources = [_ArrayTensor.of(name, array) for name, array in prefix.tensors.items()]
    write_file(path, sources, header, overwrite=overwrite)


def read_prefix(
    path: Path,
    config: ModelConfig,
    dtype: np.dtype[Any],
    made_by: Mapping[str, str],
    most_tokens: int,
) -> Prefix:
    """Reads a file, and holds it to what it must be; all of it is in memory then.

    Args:
        path: the file.
        config: the model's.
        dtype: of its KV cache.
        made_by: what must have made the prefix, by name: as the header is to have it.
        most_tokens: a longer prefix is refused.

    Raises:
        MeshwenError: it cannot be read, is damaged, was made by something else, or does not fit the
            model; says what.
    """
    if exists(path) and not path.is_file():  # A pipe may have no end.
        raise MeshwenError(f"cannot read {path}: it is no regular file")
    with ExitStack() as files:
        tensors, metadata = read_file(path, files)
        header = _header(path, metadata)
        _check_made_by(path, metadata, made_by)
        _check_tensors(path, tensors, config, dtype, most_tokens)
        arrays = {name: np.array(source.read()) for name, source in tensors.items()}
    prefix = Prefix(**arrays, cache_salt=header["cache_salt"])
    ids = prefix.token_ids
    if wrong := ids[(ids < 0) | (ids >= config.vocab_size)].tolist():
        raise MeshwenError(
            f"{path} has a token id outside the vocabulary of {config.vocab_size}: {wrong[0]}"
        )
    _check_finite(arrays, str(path))
    if prefix.sha256() != header["content_sha256"]:
        raise MeshwenError(f"{path} is damaged: its content is not what was saved; {_HINT}")
    return prefix


def _header(path: Path, metadata: Any) -> _Header:
    """A header's metadata, where it is that of a prefix."""
    named = metadata if isinstance(metadata, dict) else {}
    if named.get("format") != FORMAT or named.get("version") != VERSION:
        raise MeshwenError(f"{path} is no file of a prefix, of version {VERSION}; {_HINT}")
    return check_shape(metadata, _Header, f"the header of {path}", hint=_HINT)


def _check_made_by(path: Path, metadata: Mapping[str, str], made_by: Mapping[str, str]) -> None:
    for name, ours in made_by.items():
        if (theirs := metadata.get(name)) != ours:
            raise MeshwenError(
                f"{path} was saved with {name} {shown(theirs)}, this model has {shown(ours)}: load "
                f"the same, or {_HINT}"
            )


def _check_tensors(
    path: Path,
    tensors: Mapping[str, TensorSource],
    config: ModelConfig,
    dtype: np.dtype[Any],
    most_tokens: int,
) -> None:
    """Refuses other tensors, before any is read."""
    names = ("token_ids", "keys", "values")
    if set(tensors) != set(names):
        raise MeshwenError(
            f"{path} must have the tensors {', '.join(names)}, not {shown(sorted(tensors))}"
        )
    count = tensors["token_ids"].shape[0] if tensors["token_ids"].shape else 0
    expected = _shape(count, config)
    for name, shape, kind in (
        ("token_ids", (count,), np.dtype(np.int32)),
        ("keys", expected, dtype),
        ("values", expected, dtype),
    ):
        found = tensors[name]
        if found.shape != shape or found.dtype != kind:
            raise MeshwenError(
                f"{path}: {name} must be {kind} {list(shape)}, not {found.dtype} "
                f"{list(found.shape)}"
            )
    if not 0 < count <= most_tokens:
        raise MeshwenError(
            f"{path} has a prefix of {count} tokens, but this model takes prompts of 1 to "
            f"{most_tokens}: {'raise max_model_len' if count else _HINT}"
        )


def _shape(tokens: int, config: ModelConfig) -> tuple[int, ...]:
    """[L, T, K, H]."""
    return config.num_hidden_layers, tokens, config.num_key_value_heads, config.head_dim


def _check_finite(tensors: Mapping[str, np.ndarray], what: str) -> None:
    for name in ("keys", "values"):
        for layer, numbers in enumerate(tensors[name]):
            if not all_finite(numbers):
                raise MeshwenError(f"{what} holds NaN or infinity in the {name} of layer {layer}")


@dataclass(frozen=True, kw_only=True, eq=False)
class _ArrayTensor(TensorSource):
    """An array that is to be written."""

    array: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, name: str, array: np.ndarray) -> Self:
        """An array by its name."""
        return cls(
            name=name, shape=array.shape, dtype=array.dtype, nbytes=array.nbytes, array=array
        )

    def read(self, index: Index = ()) -> np.ndarray:
        """The array, or a part."""
        return self.array[index]
