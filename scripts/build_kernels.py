# SPDX-License-Identifier: Apache-2.0
"""Compiles the CPU kernels (src/meshwen/ops/cpu/csrc) into a shared library.

    python scripts/build_kernels.py                  for this machine, into the package
    python scripts/build_kernels.py linux-aarch64    for another, into build/linux-aarch64

An installation does the same (hatch_build.py). The compiler is clang of the package `ziglang`,
which compiles for every target on every machine; where that is not installed, or MESHWEN_CC names
another, the system's C compiler. The interface to XLA is declared by a header of `jaxlib`.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src/meshwen/ops/cpu/csrc"
LIBRARIES = ROOT / "src/meshwen/ops/cpu/kernels"
VARIABLE = "MESHWEN_TARGET"  # The target of an installation: one of TARGETS, or NONE: no kernels.
NONE = "none"
CC = "MESHWEN_CC"  # A command, such as `cc`, that compiles for this machine instead.
# What is installed to compile: the compiler; a header, of any version that the package runs with.
ZIGLANG, JAXLIB = "ziglang>=0.17,<0.18", "jaxlib>=0.7.1,<0.13"


class Target(NamedTuple):
    """A platform that kernels are compiled for.

    Attributes:
        triple: what clang calls it; with the oldest glibc or macOS.
        tag: of its wheels.
        filename: of the library.
        link: the linker's flags.
    """

    triple: str
    tag: str
    filename: str
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
_COMMON = (
    "ffi",
    "parallel",
    "instruction_sets",
    "entries",
    "paged",
    "unwritten",
    "windows",
    "build",
)
COMMON = (*(Unit(f"{name}.c") for name in _COMMON),)
# The compiler must not decide bits: a multiplication and an addition become one operation only
# where the sources say so.
FLAGS = (
    *("-std=c11", "-O2", "-g0", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"),
)


# What every source needs of a system, and that a library can be linked.
PROBE = """#include <math.h>
#include <stdlib.h>
#include <string.h>
double probe(double x) { return fma(x, x, x); }
#if defined(_WIN32) // See windows.c.
int __stdcall DllMainCRTStartup(void *library, unsigned long reason, void *reserved) { return 1; }
#endif
"""
PROBE_SECONDS, SECONDS = 120, 1200  # What a compiler may take, for the probe and for a source.


class NoKernelsError(Exception):
    """What this machine lacks to compile kernels: the package can do without."""


class Compiler(NamedTuple):
    """A C compiler: `pinned`, the one of the package `ziglang`; else the system's own.

    Attributes:
        name: with its version, which the library tells; once it is known.
    """

    command: tuple[str, ...]
    pinned: bool
    name: str = ""


def this_machine() -> str | None:
    """The name of this machine's target; None where it is none of them."""
    system = {"Darwin": "macos"}.get(platform.system(), platform.system().lower())
    machine = {"AMD64": "x86_64", "ARM64": "arm64"}.get(platform.machine(), platform.machine())
    name = f"{system}-{machine}"
    return name if name in TARGETS else None


def chosen() -> str:
    """The target that `MESHWEN_TARGET` names, else this machine.

    Raises:
        NoKernelsError: it is none of the targets, or none is asked for.
        SystemExit: there is no such target.
    """
    name = os.environ.get(VARIABLE) or this_machine()
    if name is None:
        raise NoKernelsError(f"there are none for {platform.system()} on {platform.machine()}")
    if name == NONE:
        raise NoKernelsError(f"{VARIABLE}={NONE}")
    if name not in TARGETS:
        raise SystemExit(f"{VARIABLE}={name}: it has to be one of {', '.join(TARGETS)}, {NONE}")
    return name


def requirements() -> list[str]:
    """What has to be installed to compile for the chosen target; [] where there are no kernels."""
    try:
        name = chosen()
    except NoKernelsError:
        return []
    return [JAXLIB] if os.environ.get(CC) and name == this_machine() else [ZIGLANG, JAXLIB]


def compiler(name: str) -> Compiler:
    """What compiles for a target here: the pinned compiler, else the system's.

    Of this machine's target alone what `MESHWEN_CC` names, if it does.

    Raises:
        NoKernelsError: nothing does.
    """
    unfit = []
    for one in _candidates(name):
        try:
            _probe(one, name)
        except NoKernelsError as reason:
            unfit.append(str(reason))
        else:
            for reason in unfit:
                print(f"{reason}; {one.command[0]} compiles", file=sys.stderr)
            return one._replace(name=_name_and_version(one))
    raise NoKernelsError(
        "; ".join(unfit) or f"no C compiler for {name} was found: pip install '{ZIGLANG}'"
    )


def asked_for() -> bool:
    """Whether somebody named a compiler or a target, and so wants no package without kernels."""
    return bool(os.environ.get(CC)) or os.environ.get(VARIABLE, "") not in ("", NONE)


def _candidates(name: str) -> Iterator[Compiler]:
    here = name == this_machine()
    if here and (named := os.environ.get(CC)):
        try:
            command = tuple(shlex.split(named, posix=os.name != "nt"))
        except ValueError as error:
            raise NoKernelsError(f"{CC}={named} is no command: {error}") from None
        yield Compiler(command, pinned=False)
        return
    if find_spec("ziglang"):
        zig = (sys.executable, "-m", "ziglang", "cc", "-target", TARGETS[name].triple)
        yield Compiler(zig, pinned=True)
    if here and (found := next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)):
        yield Compiler((found,), pinned=False)


def _probe(by: Compiler, name: str) -> None:
    """Refuses a compiler that makes no library of the simplest source."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(PROBE, encoding="utf-8")
        part, whole = f"{folder}/probe.o", f"{folder}/{TARGETS[name].filename}"
        # Two steps, as in `build`: in one, Zig knows no headers of Windows.
        failed = _failure(by, ("-fPIC", "-c", str(source), "-o", part), PROBE_SECONDS)
        link = ("-shared", part, *TARGETS[name].link, "-o", whole)
        failed = failed or _failure(by, link, PROBE_SECONDS)
        if not failed and not Path(whole).exists():
            failed = "error: it makes no file"
    if failed:
        reason = next((line for line in failed.splitlines() if "error" in line), failed.strip())
        raise NoKernelsError(f"the C compiler {' '.join(by.command)} cannot be used: {reason}")


_VERSION = {
    "clang": ("__clang_major__", "__clang_minor__", "__clang_patchlevel__"),
    "gcc": ("__GNUC__", "__GNUC_MINOR__", "__GNUC_PATCHLEVEL__"),
}


def _name_and_version(by: Compiler) -> str:
    """Of a compiler, by the macros that it defines."""
    with tempfile.TemporaryDirectory() as folder:
        empty, out = Path(folder, "empty.c"), Path(folder, "macros")
        empty.touch()
        _run(by, "-dM", "-E", str(empty), "-o", str(out))
        macros = dict(re.findall(r"^#define (\w+) (.*)", out.read_text(encoding="utf-8"), re.M))
    for name, numbers in _VERSION.items():  # clang says that it is gcc too.
        if numbers[0] in macros:
            found = f"{name} {'.'.join(macros[one] for one in numbers)}"
            return f"{found} (ziglang {version('ziglang')})" if by.pinned else found
    return Path(by.command[0]).name


def wheel_tag(name: str, by: Compiler) -> str:
    """What a wheel with the library of a target runs on."""
    if by.pinned:
        return f"py3-none-{TARGETS[name].tag}"
    system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    if system.startswith("macosx"):  # Python may be universal, and for older systems.
        system = f"macosx_{platform.mac_ver()[0].split('.')[0]}_0_arm64"
    return f"py3-none-{system}"


def digest() -> str:
    """Of what decides the library, beside the compiler: the sources, and this script's flags."""
    files = (*sorted(SOURCES.glob("*.[ch]")), Path(__file__))
    named = (path.name.encode() + b"\0" + path.read_bytes() for path in files)
    return hashlib.sha256(b"\0".join(named)).hexdigest()


def build(name: str, by: Compiler, folder: Path) -> Path:
    """Compiles a target's kernels, as many sources at once as there are cores.

    Returns:
        The library, in `folder`. One that was there stays until the new one is whole.

    Raises:
        NoKernelsError: jaxlib's header is missing.
        SystemExit: a source does not compile.
    """
    target = TARGETS[name]
    units = UNITS[target.triple.split("-")[0]]
    unknown = () if by.pinned else _unknown(by, units)
    known = [*(one for one in units if one not in unknown), *COMMON]
    told = (f'-DMESHWEN_COMPILER="{by.name}"', f'-DMESHWEN_SOURCES="{digest()}"')  # See build.c.
    flags = (*FLAGS, f"-I{_jaxlib_headers()}", f"-I{SOURCES}", *told)
    with tempfile.TemporaryDirectory() as objects, ThreadPoolExecutor(os.cpu_count()) as pool:
        if unknown:
            absent = Path(objects, "absent.c")
            absent.write_text(_absent(unknown), encoding="utf-8")
            known.append(Unit(str(absent)))

        def compiled(unit: Unit) -> str:
            path = f"{objects}/{Path(unit.source).name}-{unit.instruction_set}.o"
            suffix = (f"-DSUFFIX={unit.instruction_set}",) if unit.instruction_set else ()
            source = str(SOURCES / unit.source)
            _run(by, *flags, *unit.flags, *suffix, "-c", source, "-o", path)
            return path

        linked = f"{objects}/{target.filename}"
        _run(by, "-shared", *pool.map(compiled, known), *target.link, "-o", linked)
        library = folder / target.filename
        folder.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a process may have it loaded.
        part = shutil.copy(linked, folder / f".{os.getpid()}.{target.filename}")
        os.replace(part, library)
    print(f"{library}: compiled by {by.name}", file=sys.stderr)
    return library


def _unknown(by: Compiler, units: Sequence[Unit]) -> list[Unit]:
    """Those for instructions that a compiler does not know, as it is old."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.c")
        probe.write_text(PROBE, encoding="utf-8")
        output = ("-c", str(probe), "-o", f"{folder}/probe.o")
        found = [one for one in units if _failure(by, (*one.flags, *output), PROBE_SECONDS)]
    for one in found:
        print(f"without {one.instruction_set} of {one.source}: {by.name} is old", file=sys.stderr)
    return found


def _absent(units: Iterable[Unit]) -> str:
    """A source that stands for units: kernels without functions, which are never chosen."""
    lines = ['#include "kernels.h"']
    for one in units:
        kind = f"{one.source.removesuffix('.c')}_kernels"
        lines.append(f"const struct {kind} {kind}_{one.instruction_set} = {{0}};")
    return "\n".join(lines)


def _jaxlib_headers() -> str:
    spec = find_spec("jaxlib")
    if spec is None or not spec.submodule_search_locations:
        raise NoKernelsError(
            "a header of jaxlib, to compile with, was not found: pip install jaxlib"
        )
    return f"{spec.submodule_search_locations[0]}/include"


def _run(by: Compiler, *arguments: str) -> None:
    if failed := _failure(by, arguments, SECONDS):
        command = " ".join((*by.command, *arguments))
        raise SystemExit(f"the kernels do not compile: {command}\n{failed}")


def _failure(by: Compiler, arguments: Iterable[str], seconds: float) -> str:
    """Compiles; what the compiler says where it fails, else "". Warnings are printed."""
    command = [*by.command, *arguments]
    environment = dict(os.environ)
    if by.pinned:
        # Unless told not to, Zig checks for undefined behaviour, and first compiles a run-time
        # library that nothing here needs.
        command = [one.replace(_ARM, _ZIG_ARM) for one in command] + ["-fno-sanitize=undefined"]
        command += ["-nostdlib"] if "-shared" in command else []
        environment["ZIG_GLOBAL_CACHE_DIR"] = _zig_cache()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=seconds, env=environment
        )
    except OSError as error:
        return str(error)
    except subprocess.TimeoutExpired:
        return f"error: not done within {seconds:g} seconds"
    if done.returncode:
        return done.stderr or f"error: exit status {done.returncode}"
    sys.stderr.write(done.stderr)
    return ""


@cache
def _zig_cache() -> str:
    """A folder of this process's own: the user's may be missing, or not be Zig's to write."""
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    return folder.name


def main() -> None:
    """Prints where the library is, and beside it what compiled it."""
    parser = argparse.ArgumentParser(description="Compile the CPU kernels.")
    parser.add_argument("target", nargs="?", choices=TARGETS, help="default: this machine")
    parser.add_argument("--out", type=Path, help="the library's folder")
    options = parser.parse_args()
    try:
        name = options.target or chosen()
        folder = LIBRARIES if name == this_machine() else ROOT / "build" / name
        print(build(name, compiler(name), options.out or folder))
    except NoKernelsError as reason:
        raise SystemExit(f"no kernels: {reason}") from None
    except OSError as error:
        raise SystemExit(f"no kernels: cannot write {error.filename}: {error.strerror}") from None


if __name__ == "__main__":
    main()
