# SPDX-License-Identifier: Apache-2.0
"""Files that commands read when the model is there, or write when they are done."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from meshwen.common.paths import exists
from meshwen.errors import MeshwenError


def check_writable(path: Path | None, other_than: Iterable[Path] = ()) -> None:
    """Refuses a file that cannot be written, or is another that is kept, before anything is run.

    Args:
        path: of the file; None: there is none.
        other_than: files that the command reads or writes.
    """
    if path is None:
        return
    try:
        _check_writable(path, other_than)
    except (OSError, RuntimeError) as error:  # The name is too long, or a link leads to itself.
        reason = error.strerror if isinstance(error, OSError) else error
        raise MeshwenError(f"cannot write {path}: {reason}") from None


def check_readable(path: Path | None) -> None:
    """Refuses a file that is not there, before anything is run; None: there is none to read.

    Raises:
        MeshwenError: it is not there, or no file.
    """
    if path is not None and not (exists(path) and path.is_file()):
        raise MeshwenError(f"cannot read {path}: there is no such file")


def _check_writable(path: Path, other_than: Iterable[Path]) -> None:
    resolved = path.resolve()
    for other in other_than:
        if resolved == other.resolve() or (
            path.exists() and other.exists() and path.samefile(other)
        ):
            raise MeshwenError(
                f"{path} would replace a file that this command reads or writes: name another "
                "file for the report"
            )
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir():
        raise MeshwenError(f"cannot write {path}: its folder does not exist, or it is one")
    needed = [path] if path.exists() else []
    if not path.exists() or path.is_file():
        needed.append(folder)
    if not all(os.access(one, os.W_OK) for one in needed):
        raise MeshwenError(f"cannot write {path}: permission denied")


def write_text(path: Path, text: str) -> None:
    """Writes a file; one that is there is replaced only by the whole text.

    Raises:
        MeshwenError: it cannot be written.
    """
    # The bytes of a name that is no UTF-8 come out escaped.
    data = text.encode(errors="backslashreplace")
    try:
        path = path.resolve()
        if path.exists() and not path.is_file():  # A pipe, or a device.
            path.write_bytes(data)
            return
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".meshwen-") as folder:
            whole = Path(folder) / path.name
            whole.write_bytes(data)
            whole.replace(path)
    except OSError as error:
        raise MeshwenError(f"cannot write {path}: {error.strerror}") from None
