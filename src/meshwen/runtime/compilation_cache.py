# SPDX-License-Identifier: Apache-2.0
"""Compiled programs kept between runs, so that a second start does not compile.

They are executable code, so their folder is the user's alone. JAX replaces no file that is there,
and removes none. A file of a run that was killed, or of a full disk, would stay and be read in vain
for good; so the folder is tidied before it is used.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import stat
import zlib
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import jax

logger = logging.getLogger(__name__)

CACHE_LIMIT_BYTES = 2 << 30
_PROGRAM, _USED = "-cache", "-atime"  # How JAX ends the names of its files.
_TIDIED = ".tidied"
_ZLIB, _ZSTD = b"\x78", b"\x28\xb5\x2f\xfd"  # How compressed data begins.
_BLOCK_BYTES = 1 << 16  # Expanded at once: even where a damaged file says that it is very large.


def enable_compilation_cache() -> None:
    """Keeps what JAX compiles in the user's cache folder.

    The folder is `$XDG_CACHE_HOME/meshwen`, `~/.cache/meshwen` without it, and what
    `JAX_COMPILATION_CACHE_DIR` says where that is set. Ours is made for its user alone; the files
    that were not used for longest are removed where all take more than 2 GiB. Where it cannot be
    used, a warning says so, and nothing is kept. The command line calls this; a program that uses
    the Python API decides for itself.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", _own_folder())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _own_folder() -> str | None:
    """The folder, fit for use; None where it is not, which is said."""
    said = "the home folder"
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
        said = str(home / "meshwen")
        home.mkdir(parents=True, exist_ok=True)
        folder = home
        for name in ("meshwen", "xla", _host()):
            folder /= name
            _make_private(folder)
        tidy(folder)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        logger.warning(
            "compiled programs are not kept for the next run: %s cannot be used (%s); set "
            "XDG_CACHE_HOME to a folder of your own",
            said,
            reason,
        )
        return None
    return str(folder)


def _make_private(folder: Path) -> None:
    """Makes a folder that its user alone may enter, or makes the one that is there such.

    One that others could write to is emptied first.

    Raises:
        OSError: it is another's, or cannot be made or written to.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    if not hasattr(os, "getuid"):  # Windows has other permissions.
        return
    found = folder.stat()
    if found.st_uid != os.getuid():
        raise PermissionError(f"it belongs to user {found.st_uid}, who could change the programs")
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o022:  # Others may have put programs there.
        shutil.rmtree(folder)
        folder.mkdir(mode=0o700)
    elif mode & 0o077:
        folder.chmod(0o700)


def tidy(folder: Path, limit: int = CACHE_LIMIT_BYTES) -> None:
    """Removes damaged files, and the least recently used of the others beyond a limit.

    What has not changed since it was last found whole is not read again.

    Args:
        folder: JAX's files of compiled programs.
        limit: bytes of all files.

    Raises:
        OSError: the folder cannot be read or written.
    """
    stamp = folder / _TIDIED
    before = stamp.stat().st_ctime_ns if stamp.exists() else 0
    stamp.write_bytes(b"")  # First: what is written meanwhile is newer.
    stamp.chmod(0o600)
    whole: list[tuple[float, int, Path]] = []
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):  # Another process may tidy too.
            path, found = Path(entry.path), entry.stat(follow_symlinks=False)
            if not entry.name.endswith(_PROGRAM):
                continue
            if found.st_ctime_ns >= before and not _is_whole(path):
                _remove(path)
            else:
                whole.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    total = sum(size for _, size, _ in whole)
    for _, size, path in sorted(whole):
        if total <= limit:
            break
        _remove(path)
        total -= size


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_name(path.name.removesuffix(_PROGRAM) + _USED).unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    """Whether what JAX has compressed expands to its end."""
    if path.is_symlink():
        return False
    with path.open("rb") as file:
        block = file.read(_BLOCK_BYTES)
        if not block.startswith((_ZLIB, _ZSTD)):
            return False
        expander = zlib.decompressobj() if block.startswith(_ZLIB) else _zstd_expander()
        if expander is None:  # Nor can JAX read it.
            return True
        try:
            while block and not expander.eof:
                expander.decompress(block)
                block = file.read(_BLOCK_BYTES)
        except Exception:  # Each library has an error of its own.
            return False
        return bool(expander.eof)


def _zstd_expander() -> Any:
    """Of the library that JAX uses; None where there is none."""
    for name in ("compression.zstd", "zstandard"):
        with suppress(ImportError):
            found = import_module(name).ZstdDecompressor()
            return found.decompressobj() if name == "zstandard" else found
    return None


def _host() -> str:
    """Names this kind of processor: JAX's own key does not, and CPU programs depend on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    kind = f"{platform.system()} {platform.machine()} {features}"
    return hashlib.sha256(kind.encode()).hexdigest()[:16]
