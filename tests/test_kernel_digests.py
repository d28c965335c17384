# SPDX-License-Identifier: Apache-2.0
"""Ordered kernels of every instruction set give the same, known bits: on every processor."""

import importlib
import platform
import subprocess
from collections import defaultdict
from pathlib import Path

import jax
import pytest

from c_compiler import COMMAND, needs_compiler, needs_sanitizers
from digests import compare
from emulated import EMULATED, Kernels, compiled
from meshwen.ops.cpu import kernels
from needs_kernels import needs_kernels

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "src/meshwen/ops/cpu/kernels/libkernels.so"
KNOWN = {
    "matmul float32 near": "66b5ba983c8dab38",
    "matmul float32 far": "152145eb4967c05d",
    "matmul float32 subnormal": "526e8cb7322b5e0e",
    "matmul bfloat16 near": "2a2caed615b82560",
    "matmul bfloat16 far": "e0da5dd3fa56ab0c",
    "matmul bfloat16 subnormal": "bd11648239d2d32b",
    "matmul int8 near": "9c6463b15224ac79",
    "matmul int8 far": "bb6f67f174c3ba5a",
    "matmul int8 subnormal": "990b4c43a5577dc7",
    "paged_attention float32 near": "05a1389a228bb132",
    "paged_attention bfloat16 near": "340e19e99afaa2cc",
}


def digests(library: Path, folder: Path) -> dict[str, dict[str, str]]:
    """What `kernels/digests.c` prints of a library: by instruction set, then by kernel."""
    program = folder / "digests"
    sources = [ROOT / f"tests/kernels/{name}.c" for name in ("digests", "xla", "guarded")]
    command = [*COMMAND, "-std=gnu11", *map(str, sources), str(library), "-lm", "-pthread"]
    command += [f"-I{jax.ffi.include_dir()}", "-o", str(program)]
    subprocess.run(command, check=True)
    printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    found = defaultdict(dict)
    for line in printed.splitlines():
        name, *kernel, digest = line.split()
        found[name][" ".join(kernel)] = digest
    return found


@needs_kernels
@needs_compiler
def test_every_instruction_set_has_the_bits_of_every_other_processor(tmp_path):
    expected = {one.name: KNOWN for one in kernels.supported()}
    assert digests(LIBRARY, tmp_path) == expected


@needs_kernels
@needs_sanitizers  # By the system's compiler.
def test_another_compiler_gives_these_bits_too(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    build_kernels = importlib.import_module("build_kernels")
    # Of one instruction set, which all these processors have: the others take half a minute.
    one = "avx2" if platform.machine() == "x86_64" else "neon"

    def others(_, units):
        return [unit for unit in units if unit.instruction_set != one]

    monkeypatch.setattr(build_kernels, "_unknown", others)
    by = build_kernels.Compiler(COMMAND, pinned=False)
    library = build_kernels.build(build_kernels.this_machine(), by, tmp_path)
    assert digests(library, tmp_path) == {one: KNOWN}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("emulated", EMULATED, ids=lambda one: one.name)
def test_vectors_of_other_processors_give_these_bits_too(emulated: Kernels, tmp_path):
    assert digests(compiled(emulated), tmp_path) == {"portable": KNOWN}


def test_a_digest_that_differs_on_one_processor_is_found():
    one = {"x86_64": {"exp": "a", "log": "b"}}
    assert compare(one | {"aarch64": one["x86_64"]})[1]
    lines, same = compare(one | {"aarch64": {"exp": "a"}})
    assert not same
    assert ["DIFFERS" in line for line in lines] == [False, False, True]
