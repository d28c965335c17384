# SPDX-License-Identifier: Apache-2.0
"""Kernels never read or write outside of their buffers, and refuse what does not fit.

The program in `tests/kernels` calls the entries as XLA does, with every buffer against a page that
may not be read.
"""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from c_compiler import COMMAND, needs_compiler, needs_sanitizers
from emulated import EMULATED
from meshwen.ops.cpu import kernels
from meshwen.ops.cpu.kernels.shared_library import target
from needs_kernels import needs_kernels

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests/kernels"
CSRC = ROOT / "src/meshwen/ops/cpu/csrc"
LIBRARY = ROOT / "src/meshwen/ops/cpu/kernels/libkernels.so"

# A source, the name of what it makes, and flags.
Unit = tuple[Path, str, Sequence[str]]
PARTS = ("guarded", "xla", "cases", "sizes", "refusals", "threads", "main")
TESTS: list[Unit] = [(PROGRAM / f"{name}.c", name, ("-O2",)) for name in PARTS]
# With every unrolled loop, compiling takes minutes.
FLAGS = ("-std=c11", "-g", "-O0", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-psabi")
BOUNDS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
RACES = ("-fsanitize=thread",)
# Kernels allocate guarded memory as well.
GUARDED = ("-Wl,--wrap=malloc,--wrap=free",)


@pytest.fixture
def build_kernels(monkeypatch):
    """The script that knows how the package's kernels are compiled."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("build_kernels")


def compiled(
    folder: Path, units: Iterable[Unit], flags: Sequence[str], link: Sequence[str]
) -> Path:
    """The program, of some units, in a folder."""
    command = [*COMMAND, *FLAGS, *flags, f"-I{jax.ffi.include_dir()}", f"-I{CSRC}"]

    def compile_one(unit: Unit) -> str:
        source, name, more = unit
        found = f"{folder}/{name}.o"
        run([*command, *more, "-c", str(source), "-o", found])
        return found

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, units))
    program = folder / "program"
    run([*command, *objects, *link, "-o", str(program), "-lm", "-pthread"])
    return program


def run(command: Sequence[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def of_this_processor(build) -> tuple[list[Unit], list[str]]:
    """The kernels that this processor can run; link flags that leave the others out."""
    here = Path("/proc/cpuinfo").read_text(encoding="utf-8").replace("_", "").split()
    units: list[Unit] = [(CSRC / one.source, one.source, ()) for one in build.COMMON]
    left_out = ["-no-pie"]
    for source, name, flags in build.UNITS[platform.machine()]:
        if all(flag.removeprefix("-m") in here for flag in flags if flag.startswith("-mavx")):
            units.append((CSRC / source, f"{source}-{name}", (*flags, f"-DSUFFIX={name}")))
        else:
            left_out.append(f"-Wl,--defsym={source.removesuffix('.c')}_kernels_{name}=0")
    return units, left_out


def in_portable_c(*flags: str) -> list[Unit]:
    """The kernels without any processor's instructions, with the vectors that flags say."""
    flags = ("-DMESHWEN_PORTABLE", "-DSUFFIX=portable", *flags)
    return [(source, source.name, flags) for source in sorted(CSRC.glob("*.c"))]


@needs_kernels
@needs_compiler
def test_the_kernels_as_they_are_shipped(tmp_path):
    assert run([str(compiled(tmp_path, TESTS, (), [str(LIBRARY)]))])


@needs_sanitizers
def test_the_kernels_of_this_processor_under_address_and_undefined_behaviour_sanitizers(
    tmp_path, build_kernels
):
    units, link = of_this_processor(build_kernels)
    assert run([str(compiled(tmp_path, [*TESTS, *units], BOUNDS, [*link, *GUARDED]))])


@pytest.mark.slow
@needs_sanitizers
@pytest.mark.parametrize("emulated", EMULATED, ids=lambda one: one.name)
def test_the_vectors_of_other_processors_under_the_same_sanitizers(emulated, tmp_path):
    assert run(
        [str(compiled(tmp_path, [*TESTS, *in_portable_c(*emulated.flags)], BOUNDS, GUARDED))]
    )


@needs_sanitizers
def test_threads_do_not_race(tmp_path):
    program = compiled(tmp_path, [*TESTS, *in_portable_c()], RACES, ())
    assert run([str(program), "callers", "pools", "no_memory"])


@needs_kernels
def test_what_a_kernel_refuses_is_an_exception_that_says_why():
    q = jnp.zeros((3, 2, 32))
    keys, values = jnp.zeros((1, 2, 32, 64)), jnp.zeros((1, 2, 32, 32))
    where = [jnp.array(x, jnp.int32) for x in ([0, 3], [3], [[0]], [1])]
    call = jax.ffi.ffi_call(target("paged_attention"), jax.ShapeDtypeStruct(q.shape, q.dtype))
    name = kernels.instruction_set().name
    with pytest.raises(Exception, match="axis 2 of values is 32, not 64"):
        call(
            *(q, keys, values, *where), instruction_set=name, threads=np.int64(2)
        ).block_until_ready()
