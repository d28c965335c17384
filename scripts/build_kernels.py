# SPDX-License-Identifier: Apache-2.0
"""Compiles the CPU kernels (src/meshwen/ops/cpu/csrc) into a shared library.

    python scripts/build_kernels.py                  for this machine, into the package
    python scripts/build_kernels.py linux-aarch64    for another, into build/linux-aarch64

An installation does the same (hatch_build.py). The compiler is clang of the package `ziglang`,
which compiles for every target on every machine; where that is not installed, the system's C
compiler. The interface to XLA is declared by a header of the package `jaxlib`.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src/meshwen/ops/cpu/csrc"
LIBRARIES = ROOT / "src/meshwen/ops/cpu/kernels"
VARIABLE = "MESHWEN_TARGET"  # The target of an installation: one of TARGETS, or NONE: no kernels.
NONE = "none"


class Target(NamedTuple):
    """A platform that kernels are compiled for.

    Attributes:
        triple: what clang calls it; with the oldest glibc or macOS.
        tag: of its wheels.
        library: the file's name.
        link: the linker's flags.
    """

    triple: str
    tag: str
    library: str
    link: tuple[str, ...]


# -s: no symbols but those of exported functions; defs: a symbol that no library has is an error.
_LINUX = ("libkernels.so", ("-s", "-Wl,-z,defs", "-lc", "-lm"))
_MACOS = ("libkernels.dylib", ("-Wl,-install_name,@rpath/libkernels.dylib", "-lc"))
_WINDOWS = ("kernels.dll", ("-s", "-nostdlib", "-lucrtbase", "-lkernel32"))  # See windows.c.
TARGETS = {
    "linux-x86_64": Target("x86_64-linux-gnu.2.17", "manylinux_2_17_x86_64", *_LINUX),
    "linux-aarch64": Target("aarch64-linux-gnu.2.17", "manylinux_2_17_aarch64", *_LINUX),
    "macos-arm64": Target("aarch64-macos.11.0", "macosx_11_0_arm64", *_MACOS),
    "windows-x86_64": Target("x86_64-windows-gnu", "win_amd64", *_WINDOWS),
}


class Unit(NamedTuple):
    """A source; compiled for an instruction set, in whose name its symbols end."""

    source: str
    instruction_set: str = ""
    flags: tuple[str, ...] = ()


_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl")
_ARM = "-march=armv8.2-a"
_ZIG_ARM = "-mcpu=generic"  # Zig has no -march.
# Of each architecture, those first that take the longest.
UNITS = {
    "x86_64": (
        Unit("int8.c", "portable"),
        Unit("float.c", "avx512_bf16", (*_AVX512, "-mavx512bf16", "-DMESHWEN_DOT")),
        Unit("float.c", "avx512", _AVX512),
        Unit("float.c", "avx2", _AVX2),
        Unit("float.c", "portable"),
        Unit("int8.c", "avx512_vnni", (*_AVX512, "-mavx512vnni")),
        Unit("int8.c", "avx_vnni", (*_AVX2, "-mavxvnni")),
        Unit("int8.c", "avx2", _AVX2),
    ),
    "aarch64": (
        Unit("int8.c", "portable"),
        Unit("float.c", "neon_bf16", (f"{_ARM}+bf16", "-DMESHWEN_DOT")),
        Unit("float.c", "neon"),
        Unit("float.c", "portable"),
        Unit("int8.c", "neon_dot", (f"{_ARM}+dotprod",)),
        Unit("int8.c", "neon"),
    ),
}
COMMON = tuple(map(Unit, ("ffi.c", "parallel.c", "instruction_sets.c", "entries.c", "windows.c")))
# The compiler must not decide bits: a multiplication and an addition become one operation only
# where the sources say so.
FLAGS = (
    *("-std=c11", "-O2", "-g0", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"),
)


class Compiler(NamedTuple):
    """A C compiler: `pinned`, the one of the package `ziglang`; else the system's own."""

    command: tuple[str, ...]
    pinned: bool


def this_machine() -> str | None:
    """The name of this machine's target; None where it is none of them."""
    system = {"Darwin": "macos"}.get(platform.system(), platform.system().lower())
    machine = {"AMD64": "x86_64", "ARM64": "arm64"}.get(platform.machine(), platform.machine())
    name = f"{system}-{machine}"
    return name if name in TARGETS else None


def chosen() -> str | None:
    """The target that `MESHWEN_TARGET` names, else this machine; None: without kernels.

    Raises:
        SystemExit: there is no such target.
    """
    name = os.environ.get(VARIABLE) or this_machine()
    if name is None or name in TARGETS:
        return name
    if name == NONE:
        return None
    raise SystemExit(f"{VARIABLE}={name}: it has to be one of {', '.join(TARGETS)}, {NONE}")


def compiler(name: str) -> Compiler | None:
    """What compiles for a target here; None: nothing does."""
    if find_spec("ziglang"):
        command = (sys.executable, "-m", "ziglang", "cc", "-target", TARGETS[name].triple)
        return Compiler(command, pinned=True)
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    return Compiler((found,), pinned=False) if found and name == this_machine() else None


def wheel_tag(name: str, by: Compiler) -> str:
    """What a wheel with the library of a target runs on."""
    system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return f"py3-none-{TARGETS[name].tag if by.pinned else system}"


def build(name: str, by: Compiler, folder: Path) -> Path:
    """Compiles a target's kernels, as many sources at once as there are cores.

    Returns:
        The library, in `folder`.

    Raises:
        SystemExit: a source does not compile, or jaxlib's header is missing.
    """
    target = TARGETS[name]
    units = (*UNITS[target.triple.split("-")[0]], *COMMON)
    flags = (*FLAGS, f"-I{_jaxlib_headers()}")
    with tempfile.TemporaryDirectory() as objects, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compiled(unit: Unit) -> str:
            path = f"{objects}/{unit.source}-{unit.instruction_set}.o"
            suffix = (f"-DSUFFIX={unit.instruction_set}",) if unit.instruction_set else ()
            source = str(SOURCES / unit.source)
            _run(by, *flags, *unit.flags, *suffix, "-c", source, "-o", path)
            return path

        linked = f"{objects}/{target.library}"
        _run(by, "-shared", *pool.map(compiled, units), *target.link, "-o", linked)
        library = folder / target.library
        folder.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)  # Not overwritten: a process may have it loaded.
        shutil.move(linked, library)
        return library


def _jaxlib_headers() -> str:
    spec = find_spec("jaxlib")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the kernels need a header of jaxlib to compile: pip install jaxlib")
    return f"{spec.submodule_search_locations[0]}/include"


def _run(by: Compiler, *arguments: str) -> None:
    if by.pinned:
        # Unless told not to, Zig checks for undefined behaviour, and first compiles a run-time
        # library that nothing here needs.
        arguments = (*(one.replace(_ARM, _ZIG_ARM) for one in arguments), "-fno-sanitize=undefined")
        arguments += ("-nostdlib",) if "-shared" in arguments else ()
    done = subprocess.run([*by.command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        command = " ".join((*by.command, *arguments))
        raise SystemExit(f"the kernels do not compile: {command}\n{done.stderr}")
    sys.stderr.write(done.stderr)  # Warnings.


def main() -> None:
    """Prints where the library is."""
    parser = argparse.ArgumentParser(description="Compile the CPU kernels.")
    parser.add_argument("target", nargs="?", choices=TARGETS, help="default: this machine")
    parser.add_argument("--out", type=Path, help="the library's folder")
    options = parser.parse_args()
    name = options.target or chosen()
    by = compiler(name) if name else None
    if name is None or by is None:
        raise SystemExit("no C compiler for this target was found: pip install ziglang")
    folder = LIBRARIES if name == this_machine() else ROOT / "build" / name
    print(build(name, by, options.out or folder))


if __name__ == "__main__":
    main()
