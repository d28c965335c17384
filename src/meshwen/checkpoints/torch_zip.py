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
from typing import Any

from meshwen.errors import MeshwenError
from meshwen.json_files import shown

_LARGEST_PICKLE = 1 << 24  # bytes: a hundred times that of Qwen2.5-72B
_MOST_OBJECTS = 10**7
_LOCAL_NAME_LENGTHS = 26, 30  # bytes: where they stand in a local header, and where it ends
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
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                    raise ValueError(f"{shown(info.filename)} is compressed")
                _, _, part = info.filename.partition("/")
                if part == "data.pkl":
                    _check_pickle(archive, info)
                if part.startswith("data/") and info.file_size:
                    records.append(Record(_data_offset(file, info), info.file_size))
            return sorted(records, key=lambda record: record.offset)
    except OSError as error:
        raise MeshwenError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # zipfile raises anything on damaged files.
        raise MeshwenError(
            f"{path} cannot be loaded as torch weights ({error or type(error).__name__}): "
            "download it again, or convert it to safetensors"
        ) from None


def _data_offset(file: Any, info: zipfile.ZipInfo) -> int:
    lengths, end = _LOCAL_NAME_LENGTHS
    file.seek(info.header_offset + lengths)
    return info.header_offset + end + sum(struct.unpack("<HH", file.read(4)))


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
