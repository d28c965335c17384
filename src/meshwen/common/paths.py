# SPDX-License-Identifier: Apache-2.0
"""Paths as users write them: `pathlib` raises where a name is too long, or a home unknown."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from meshwen.common.arguments import brief
from meshwen.errors import MeshwenError


def user_path(name: str | PathLike[str]) -> Path:
    """A path with `~` expanded.

    Raises:
        MeshwenError: the name is empty, holds a NUL, or begins with the home of nobody.
    """
    if not isinstance(name, str | PathLike):
        raise MeshwenError(f"a path must be text or a Path, not {brief(name)}")
    if not str(name).strip():
        raise MeshwenError(f"{str(name)!r} is no name of a file or folder")
    if "\0" in str(name):
        raise MeshwenError(f"{brief(str(name))} holds a NUL, which no path may")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise MeshwenError(f"{name}: {error}; write the path without ~") from None


def exists(path: Path) -> bool:
    """Whether there is such a file or folder.

    Raises:
        MeshwenError: that cannot be said, as inside of a folder that may not be entered.
    """
    try:
        return path.exists()
    except OSError as error:
        raise MeshwenError(f"cannot look at {path}: {error.strerror}") from None
