# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file: metadata, and where tensors lie.

It is read here: the gguf package's reader makes an array of every string, which takes seconds and
hundreds of megabytes for Qwen's vocabulary. What is read is bounded by the bytes that are there,
and by limits far above those of published files, before anything is sized by it.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwen.common.json_files import shown

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9

_LARGEST_HEADER = 1 << 26  # bytes: ten times the header of Qwen2.5
_MOST_ENTRIES = 1 << 16  # of metadata, and of tensors
_MOST_DIMENSIONS = 4  # ggml's


@dataclass(frozen=True)
class TensorInfo:
    """What the header says about a tensor; `offset` is in bytes from the header's end."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True)
class Header:
    """A whole header; tensors begin at byte `data_start`, each at a multiple of `alignment`."""

    metadata: dict[str, Any]
    tensors: list[TensorInfo]
    data_start: int
    alignment: int


def read_header(buffer: mmap.mmap | bytes) -> Header:
    """Reads the header of a file.

    Raises ValueError, or what else a damaged header makes of it: see `DAMAGED`.
    """
    return _Reader(buffer).read()


# What `read_header` raises.
DAMAGED = (struct.error, ValueError, KeyError, OverflowError, RecursionError)


class _Reader:
    """Reads a header from front to back."""

    def __init__(self, buffer: mmap.mmap | bytes):
        self._buffer = buffer
        self._end = min(len(buffer), _LARGEST_HEADER)
        self._at = 0

    def read(self) -> Header:
        if self._buffer[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            # A big-endian file shows its version in the upper half.
            raise ValueError(f"version {version:#x}; versions 2 and 3, little-endian, can be read")
        tensor_count, entry_count = self._scalar("Q"), self._scalar("Q")
        if max(tensor_count, entry_count) > _MOST_ENTRIES:
            raise ValueError(f"it declares {tensor_count} tensors, {entry_count} metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self._string()
            if key in metadata:
                raise ValueError(f"the key {shown(key)} is there twice")
            metadata[key] = self._value(self._scalar("I"))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {shown(alignment)}, which is no power of two")
        return Header(metadata, infos, -(-self._at // alignment) * alignment, alignment)

    def _past(self, at: int, what: str) -> None:
        """Refuses to read up to `at` where that is beyond the file, or a header's limit."""
        if at > len(self._buffer):
            raise ValueError(f"it ends inside {what}")
        if at > self._end:
            raise ValueError(f"its header is above {_LARGEST_HEADER >> 20} MiB")

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._buffer, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        # Qwen's vocabulary has 300,000 of them: everything here is a local variable.
        buffer, at, length = self._buffer, self._at, struct.Struct("<Q").unpack_from
        end = self._end
        strings = []
        for _ in range(count):
            start = at + 8
            at = start + length(buffer, at)[0]
            if at > end:
                self._past(at, "a string")
            strings.append(buffer[start:at].decode("utf-8"))
        self._at = at
        return strings

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        item_kind, count = self._scalar("I"), self._scalar("Q")
        if item_kind == _STRING:
            return self._strings(count)
        if item_kind == _ARRAY:
            return [self._value(_ARRAY) for _ in range(count)]
        code = f"<{_SCALARS[item_kind]}"
        self._past(self._at + count * struct.calcsize(code), "an array")
        items = np.frombuffer(self._buffer, code, count, self._at).tolist()
        self._at += count * struct.calcsize(code)
        return items

    def _tensor_info(self) -> TensorInfo:
        name = self._string()
        dimensions = self._scalar("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{shown(name)} has {dimensions} dimensions")
        # ggml writes the fastest dimension first.
        shape = tuple(reversed([self._scalar("Q") for _ in range(dimensions)]))
        return TensorInfo(name, shape, self._scalar("I"), self._scalar("Q"))
