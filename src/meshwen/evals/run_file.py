# SPDX-License-Identifier: Apache-2.0
"""Run files: the settings and every answer, a JSON object a line, safe against any interruption.

The first line holds the settings. Each answer is one write that reaches the disk before the next
problem's; so a run that is killed leaves whole lines and at most one torn one, the last, which is
cut off when the run goes on.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Annotated, Any, NotRequired, Self

from annotated_types import Ge
from typing_extensions import TypedDict

from meshwen.common.json_files import (
    Count,
    Finite,
    Shape,
    TokenId,
    check_shape,
    parse_json,
    to_json,
)
from meshwen.common.paths import exists
from meshwen.errors import MeshwenError

try:
    import fcntl
except ImportError:  # On Windows.
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# What says that there are no locks: of network disks without them, and of a system without flock.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}

FORMAT = "meshwen-eval-3"
_BEGINNING = b'{"format": "meshwen-eval-'  # of run files of all versions

# Settings of runs from before there was a choice.
_EARLIER = {"products": "xla", "grading": 1, "exact_version": 1}
_TO_DO = {
    "products": "set MESHWEN_INSTRUCTION_SET to the same (none for xla), or",
    "exact_version": "its answers have the bits of another version's exact numerics;",
    "grading": "its answers were found and graded by earlier rules;",
}
_HINT = "it was edited or damaged"
_Number = TokenId  # Of a problem or sample: as small as a token id.


class _Settings(TypedDict):
    model: str
    mesh: str
    prompt_style: str
    dtype: NotRequired[str]
    numerics: NotRequired[str]
    quantization: NotRequired[str | None]


class _Header(TypedDict):
    settings: _Settings


class _Answer(TypedDict):
    """What every answer has; `error` where it has no text.

    Those of earlier versions do not say how long their prompts were, and how much of them was in
    the KV cache.
    """

    id: _Number
    sample: _Number
    question: str
    prompt_sha256: str
    tokens: list[TokenId]
    text: str
    extracted: str | None
    gold: str
    correct: bool
    finish_reason: str
    elapsed: Annotated[Finite, Ge(0)]
    error: NotRequired[str]
    prompt_tokens: NotRequired[Count]
    cached_tokens: NotRequired[Count]


class _Failure(TypedDict):
    error: str


Record = dict[str, Any]
Key = tuple[int, int]  # Of an answer: its problem's number, and which sample it is, from 0.


@dataclass
class RunFile:
    """An evaluation's settings and answers so far, and the open file that gets more.

    Attributes:
        path: the file.
        settings: what makes its answers comparable.
        records: the answers.
    """

    path: Path
    settings: Mapping[str, Any]
    records: dict[Key, Record] = field(default_factory=dict)
    _file: FileIO | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """A run file, to look at; a torn last line is passed over.

        Raises:
            MeshwenError: it cannot be read or is no run file; names the line.
        """
        found = cls._whole_lines(path)
        if not found:
            raise MeshwenError(f"{path} is no run file: it is empty, or its first line is cut off")
        return cls(path, _settings(path, found[0]), _records(path, found[1:]))

    @classmethod
    def begin(cls, path: Path, settings: Mapping[str, Any], *, resume: bool) -> Self:
        """A run file to write to.

        Args:
            path: the file.
            settings: of this run.
            resume: go on with the file where it has answers; without, it must have none.

        Raises:
            MeshwenError: it has answers, or other settings, or is no run file, or cannot be
                written, or another run is writing it.
        """
        check_new(path, resume=resume)
        try:
            # Opened to read and write, so that what was written is never cut but by truncate.
            # Not buffered: what a full disk has refused must not be written later.
            file = path.open("r+b" if path.exists() else "x+b", buffering=0)
        except OSError as error:
            raise MeshwenError(f"cannot write {path}: {error.strerror}") from None
        try:
            return cls._go_on(path, settings, file)
        except BaseException:
            file.close()
            raise

    @classmethod
    def _go_on(cls, path: Path, settings: Mapping[str, Any], file: FileIO) -> Self:
        """The run of an open file, which nobody else may be writing."""
        _lock(path, file)
        new = _without_answers(path)
        lines = [] if new else cls._whole_lines(path)
        run = cls(path, settings, {}, file)
        if not new:
            _check_same(path, _settings(path, lines[0] if lines else b""), settings)
            run.records = _records(path, lines[1:])
        try:
            file.truncate(sum(len(line) + 1 for line in lines))
        except OSError as error:
            raise MeshwenError(f"cannot write {path}: {error.strerror}") from None
        file.seek(0, os.SEEK_END)
        if new:
            run._append({"format": FORMAT, "settings": dict(settings)})
        return run

    @property
    def seconds(self) -> float:
        """What all answers took, over all the times that the run went on."""
        return max((record["elapsed"] for record in self.records.values()), default=0.0)

    def write(self, record: Record) -> None:
        """Adds an answer, which has its problem's number as "id" and its own as "sample".

        Raises:
            MeshwenError: the disk is full or gone; what was written before is intact.
        """
        self._append(record)
        self.records[_key(record)] = record

    def close(self) -> None:
        """Nothing can be written any more."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, content: Mapping[str, Any]) -> None:
        assert self._file is not None
        end = self._file.tell()
        try:
            line = memoryview(to_json(content, ensure_ascii=False).encode() + b"\n")
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._cut(end)
            raise MeshwenError(
                f"cannot write {self.path}: {error.strerror}; {len(self.records)} answers are "
                "saved in it, go on with --resume"
            ) from None

    def _cut(self, end: int) -> None:
        """Takes back what a failed write may have left; what stays would be passed over anyway."""
        try:
            os.truncate(self.path, end)
        except OSError:
            return

    @staticmethod
    def _whole_lines(path: Path) -> list[bytes]:
        _check_regular(path)
        try:
            with path.open("rb") as file:
                beginning = file.read(len(_BEGINNING))
                if beginning != _BEGINNING[: len(beginning)]:  # Of whatever size, and not ours.
                    raise MeshwenError(f"{path} is no run file of this version ({FORMAT})")
                content = beginning + file.read()
        except OSError as error:
            raise MeshwenError(f"cannot read {path}: {error.strerror}") from None
        return content.split(b"\n")[:-1]  # What follows the last line's end is torn, or nothing.


def check_new(path: Path, *, resume: bool) -> None:
    """Refuses a file that is there and not to be gone on with.

    Raises:
        MeshwenError: it exists, and not only as what a run leaves that stopped before an answer.
    """
    if exists(path) and not resume and not _without_answers(path):
        raise MeshwenError(f"{path} exists: add --resume to go on with it, or name another")


class UnwrittenRun(RunFile):
    """A run that another process writes: the same answers, in memory alone."""

    @classmethod
    def of(cls, path: Path, settings: Mapping[str, Any], records: list[Record]) -> Self:
        """A run that has these answers."""
        return cls(path, settings, {_key(record): record for record in records})

    def write(self, record: Record) -> None:
        """Adds an answer."""
        self.records[_key(record)] = record


def _lock(path: Path, file: FileIO) -> None:
    """Keeps other runs from writing an open file, until it is closed."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "this system has no flock")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise MeshwenError(f"another run is writing {path}: wait for it, or end it") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise MeshwenError(f"cannot lock {path}: {error.strerror}") from None
        logger.warning(
            "%s cannot be locked (%s): let no other run write it meanwhile", path, error.strerror
        )


def _without_answers(path: Path) -> bool:
    """Whether a file is empty, or what a run leaves that stopped before its first answer."""
    _check_regular(path)
    try:
        with path.open("rb") as file:
            beginning = file.read(len(_BEGINNING))
            if beginning != _BEGINNING[: len(beginning)]:
                return False
            file.readline()
            return not file.readline().endswith(b"\n")
    except OSError as error:
        raise MeshwenError(f"cannot read {path}: {error.strerror}") from None


def _check_regular(path: Path) -> None:
    """Refuses a device or a pipe, which may have no end."""
    if exists(path) and not path.is_file():
        raise MeshwenError(f"{path} is not a regular file: answers cannot be kept in it")


def _settings(path: Path, line: bytes) -> dict[str, Any]:
    content = _parsed(line, f"{path}, line 1", dict[str, Any])
    if content.get("format") != FORMAT:
        raise MeshwenError(f"{path} is no run file of this version ({FORMAT})")
    return dict(check_shape(content, _Header, f"{path}, line 1", hint=_HINT)["settings"])


def _key(record: Record) -> Key:
    return record["id"], record["sample"]


def _records(path: Path, lines: list[bytes]) -> dict[Key, Record]:
    records = {}
    for at, line in enumerate(lines, start=2):
        where = f"{path}, line {at}"
        record: Record = dict(_parsed(line, where, _Answer))
        if record["finish_reason"] == "error":
            check_shape(record, _Failure, where, hint=_HINT)
        if _key(record) in records:
            raise MeshwenError(f"{where}: answers problem {record['id']} again: {_HINT}")
        records[_key(record)] = record
    return records


def _parsed(line: bytes, where: str, shape: type[Shape]) -> Shape:
    return check_shape(parse_json(line, where, hint=_HINT), shape, where, hint=_HINT)


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    before, now = (_EARLIER | dict(settings) for settings in (before, now))
    for name in dict.fromkeys((*before, *now)):
        if name == "prompt_style_why":  # Asked for or by default, it is the same style.
            continue
        if _comparable(name, before.get(name)) != _comparable(name, now.get(name)):
            raise MeshwenError(
                f"{path} was made with {name} {before.get(name)!r}, this run has "
                f"{now.get(name)!r}: {_TO_DO.get(name, 'give the same, or')} give another file"
            )


def _comparable(name: str, value: Any) -> Any:
    """A setting's value, equal for meshes that differ by axes of one device alone."""
    if name != "mesh" or not isinstance(value, str) or "=" in value:
        return value
    return [size for size in value.split("x") if size != "1"]
