# SPDX-License-Identifier: Apache-2.0
"""The archive that a torch file is: its directory and its pickle, looked at before torch does.

When torch maps a file, it takes numbers from where a record begins, whatever the record's size, and
whether it is compressed or not; and a pickle of a hundred bytes can ask for more than a lifetime.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from meshwen.common.json_files import shown
from meshwen.errors import MeshwenError

_LARGEST_PICKLE = 1 << 24  # bytes: a hundred times that of Qwen2.5-72B
_MOST_OBJECTS = 10**7
# Before each record: magic, (version, flags), method, (time, checksum, sizes), lengths of names.
_LOCAL_HEADER = struct.Struct("<4s4xH16xHH")
_UTF8_NAME = 0x800  # a flag
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
_GETS = ("GET", "BINGET", "LONG_BINGET")


@dataclass(frozen=True)
class Record:
    """Where the numbers of one storage lie in the file, in bytes."""

    offset: int
    nbytes: int


def read_records(path: Path) -> list[Record]:
    """The records of numbers in the order of the file, but for empty ones.

    Raises MeshwenError when the file is no archive as torch writes it.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            records = []
            end = 0
            for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
                if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                    raise ValueError(f"{shown(info.filename)} is compressed")
                offset = _data_offset(file, info)
                if info.header_offset < end:
                    raise ValueError(f"{shown(info.filename)} begins inside another record")
                end = offset + info.file_size
                _, _, part = info.filename.partition("/")
                if part == "data.pkl":
                    _check_pickle(archive, info)
                if part.startswith("data/") and info.file_size:
                    records.append(Record(offset, info.file_size))
            return records
    except OSError as error:
        raise MeshwenError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # zipfile raises anything on damaged files.
        raise MeshwenError(
            f"{path} cannot be loaded as torch weights ({error or type(error).__name__}): "
            "download it again, or convert it to safetensors"
        ) from None


def _data_offset(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where a record's content begins: behind a header of its own, which must be its own."""
    file.seek(info.header_offset)
    magic, method, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    encoding = "utf-8" if info.flag_bits & _UTF8_NAME else "cp437"
    name = file.read(name_bytes)
    if (magic, method, name) != (b"PK\3\4", 0, info.orig_filename.encode(encoding)):
        raise ValueError(f"{shown(info.filename)} has another record's header")
    return info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes


def _check_pickle(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Refuses a pickle whose objects, each counted wherever it is referred to, are too many.

    Tuples that hold another twice, which holds another twice, take for ever to hash.
    """
    if info.file_size > _LARGEST_PICKLE:
        raise ValueError(f"{shown(info.filename)} has {info.file_size} bytes")
    stack: list[int] = []
    marks: list[int] = []  # heights of the stack
    memo: dict[Any, int] = {}
    for op, argument, _ in pickletools.genops(archive.read(info)):
        if op.name in _PUTS:
            memo[argument] = stack[-1]
        elif op.name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op.name in _GETS:
            stack.append(memo[argument])
        elif op.name == "MARK":
            marks.append(len(stack))
        else:
            below = op.stack_before
            to_mark = pickletools.stackslice in below or op.name == "POP_MARK"
            start = marks.pop() if to_mark else len(stack)
            start -= sum(item not in _OF_MARKS for item in below)
            size = 1 + sum(stack[start:])
            if start < 0 or size > _MOST_OBJECTS:
                raise ValueError(f"{shown(info.filename)} refers to too many objects")
            stack[start:] = [size] * len(op.stack_after)


_OF_MARKS = (pickletools.markobject, pickletools.stackslice)
