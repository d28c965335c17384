# SPDX-License-Identifier: Apache-2.0
"""Prints requirements of pyproject.toml, one a line, for pip's `-r`.

    python scripts/requirements.py dev gguf    what builds and what runs the package, and extras
    python scripts/requirements.py --build     what builds the package and its kernels

The Makefile installs them before the package, which it then builds without pip's isolation: that
would unpack the compiler, 400 MB, for every build. Requirements are built with it, as they expect.
"""

import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import build_kernels

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def of_build(declared: dict[str, Any]) -> Iterator[str]:
    """Those of the package's build, and of its kernels'."""
    yield from declared["build-system"]["requires"]
    yield from build_kernels.requirements()


def requirements(declared: dict[str, Any], extras: Sequence[str]) -> Iterator[str]:
    """Those of the build, of running it and of extras."""
    yield from of_build(declared)
    yield from declared["project"]["dependencies"]
    for extra in extras:
        yield from of_extra(declared, extra)


def of_extra(declared: dict[str, Any], extra: str) -> Iterator[str]:
    """Those of an extra, which may name others of the package."""
    for one in declared["project"]["optional-dependencies"][extra]:
        if others := re.fullmatch(r"meshwen\[(.*)\]", one):
            for other in others[1].split(","):
                yield from of_extra(declared, other)
        else:
            yield one


if __name__ == "__main__":
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))
    if sys.argv[1:] == ["--build"]:
        print(*of_build(project), sep="\n")
    else:
        print(*requirements(project, sys.argv[1:]), sep="\n")
