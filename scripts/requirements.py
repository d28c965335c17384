# SPDX-License-Identifier: Apache-2.0
"""Prints requirements of pyproject.toml, one a line, for pip's `-r`.

    python scripts/requirements.py          what builds and what runs the package
    python scripts/requirements.py build    what builds wheels: with the oldest jaxlib

The Makefile installs them before the package, which it then builds without pip's isolation: that
would unpack the compiler, 400 MB, for every build.
"""

import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def requirements(build_only: bool) -> list[str]:
    """Those of the build, and of running it: then jaxlib is what belongs to jax."""
    declared = tomllib.loads(PROJECT.read_text(encoding="utf-8"))
    build: list[str] = declared["build-system"]["requires"]
    if build_only:
        return build
    run: list[str] = declared["project"]["dependencies"]
    return [one for one in build if not one.startswith("jaxlib")] + run


if __name__ == "__main__":
    print(*requirements(sys.argv[1:] == ["build"]), sep="\n")
