# SPDX-License-Identifier: Apache-2.0
"""Compiles the CPU kernels (scripts/build_kernels.py) into wheels and editable installations.

Hatchling calls it: pyproject.toml, [tool.hatch.build.targets.wheel.hooks.custom]. Where the machine
lacks what compiles them, the package is without kernels, which it says when it runs; a source that
does not compile is an error.
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

    def dependencies(self) -> list[str]:
        """What pip installs to build with, beside hatchling."""
        return build_kernels.requirements()

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles for `MESHWEN_TARGET`, else for this machine.

        An editable installation gets the library into the source tree, a wheel into itself alone.
        """
        try:
            self._compile(version == "editable", build_data)
        except build_kernels.NoKernelsError as reason:
            if build_kernels.asked_for():
                self.app.abort(f"the kernels that were asked for cannot be built: {reason}")
            self.app.display_warning(f"meshwen is built without its kernels: {reason}")
            if version == "editable":  # One of older sources would be refused when it is loaded.
                for target in build_kernels.TARGETS.values():
                    (build_kernels.LIBRARIES / target.filename).unlink(missing_ok=True)

    def _compile(self, editable: bool, build_data: dict[str, Any]) -> None:
        name = build_kernels.chosen()
        compiler = build_kernels.compiler(name)
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
