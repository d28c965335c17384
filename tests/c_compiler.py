# SPDX-License-Identifier: Apache-2.0
"""The C compiler of tests: the system's; else clang of the package ziglang, without sanitizers."""

import shutil
import sys
from importlib.util import find_spec

import pytest

_CC = shutil.which("cc")
_ZIG = (sys.executable, "-m", "ziglang", "cc", "-fno-sanitize=all") if find_spec("ziglang") else ()
COMMAND: tuple[str, ...] = (_CC,) if _CC else _ZIG

needs_compiler = pytest.mark.skipif(
    not COMMAND or sys.platform != "linux", reason="no C compiler for Linux"
)
needs_sanitizers = pytest.mark.skipif(
    not _CC or sys.platform != "linux", reason="no C compiler for Linux with sanitizers"
)
