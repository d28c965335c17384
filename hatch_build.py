# SPDX-License-Identifier: Apache-2.0
"""Compiles the CPU kernels (scripts/build_kernels.py) into wheels and editable installations.

Hatchling calls it: pyproject.toml, [tool.hatch.build.targets.wheel.hooks.custom]. Where there is no
C compiler, the package is without kernels, which it says when it runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).parent / "scripts"))
import build_kernels


class KernelsHook(BuildHookInterface[Any]):
    """Compiles before a wheel is put together; see hatchling."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles for `MESHWEN_TARGET`, else for this machine.

        An editable installation gets the library into the source tree, a wheel into itself alone.
        """
        name = build_kernels.chosen()
        compiler = build_kernels.compiler(name) if name else None
        editable = version == "editable"
        if editable:  # None that is older than the sources stays.
            for target in build_kernels.TARGETS.values():
                (build_kernels.LIBRARIES / target.library).unlink(missing_ok=True)
        if name is None or compiler is None:
            self.app.display_warning(
                "no C compiler was found: meshwen is built without its kernels"
            )
            return
        if editable:
            build_kernels.build(name, compiler, build_kernels.LIBRARIES)
            return
        self._folder = TemporaryDirectory()
        library = build_kernels.build(name, compiler, Path(self._folder.name))
        place = build_kernels.LIBRARIES.relative_to(build_kernels.ROOT / "src") / library.name
        build_data["force_include"][str(library)] = place.as_posix()
        build_data["pure_python"] = False
        build_data["tag"] = build_kernels.wheel_tag(name, compiler)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Forgets the library once the wheel has it."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()
