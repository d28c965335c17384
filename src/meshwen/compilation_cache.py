# SPDX-License-Identifier: Apache-2.0
"""Compiled programs kept between runs, so that a second start does not compile."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import jax


def enable_compilation_cache() -> None:
    """Keeps what JAX compiles in the user's cache folder.

    The folder is `$XDG_CACHE_HOME/meshwen`, `~/.cache/meshwen` without it, and what
    `JAX_COMPILATION_CACHE_DIR` says where that is set. The command line calls this; a program that
    uses the Python API decides for itself.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        jax.config.update(
            "jax_compilation_cache_dir", str(Path(home) / "meshwen" / "xla" / _host())
        )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _host() -> str:
    """Names this kind of processor: JAX's own key does not, and CPU programs depend on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    kind = f"{platform.system()} {platform.machine()} {features}"
    return hashlib.sha256(kind.encode()).hexdigest()[:16]
