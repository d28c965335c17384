# SPDX-License-Identifier: Apache-2.0
"""Files that commands write when they are done."""

from __future__ import annotations

import os
from pathlib import Path

from meshwen.errors import MeshwenError


def check_writable(path: Path | None) -> None:
    """Refuses a file that cannot be written, before anything is run."""
    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir():
        raise MeshwenError(f"cannot write {path}: its folder does not exist, or it is one")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise MeshwenError(f"cannot write {path}: permission denied")


def write_text(path: Path, text: str) -> None:
    """Writes a file.

    Raises:
        MeshwenError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MeshwenError(f"cannot write {path}: {error.strerror}") from None
