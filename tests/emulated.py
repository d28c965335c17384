# SPDX-License-Identifier: Apache-2.0
"""Kernels of every instruction set that this processor has, and what stands in for others.

The sources are compiled once more in portable C, with the shapes of another instruction set's
vectors: so their tiles run on any processor. Its own instructions do not.
"""

import ctypes
import hashlib
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jaxlib
import pytest

from c_compiler import COMMAND
from meshwen.ops.cpu import kernels
from meshwen.ops.cpu.kernels import shared_library
from needs_kernels import needs_kernels

SOURCES = Path(__file__).parents[1] / "src/meshwen/ops/cpu/csrc"


@dataclass(frozen=True)
class Kernels:
    """Kernels to be tested.

    Attributes:
        name: of the instruction set, or of what is emulated.
        flags: of the compiler, of an emulated one.
        has_bf16_dot: whether pairs of bfloat16 are multiplied by one instruction.
    """

    name: str
    flags: tuple[str, ...] = ()
    has_bf16_dot: bool = False

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Makes these the process's kernels."""
        found = kernels.InstructionSet("portable" if self.flags else self.name, self.has_bf16_dot)
        monkeypatch.setattr(kernels, "instruction_set", lambda: found)
        if self.flags:
            prefix = _registered(self)
            monkeypatch.setattr(kernels, "target", lambda function: f"{prefix}_{function}")


EMULATED = (
    Kernels("avx512_bf16", ("-DMESHWEN_LANES=16", "-DMESHWEN_DOT", "-DMESHWEN_UNSIGNED"), True),
    Kernels("avx_vnni", ("-DMESHWEN_LANES=8", "-DMESHWEN_UNSIGNED")),
    Kernels("neon_bf16", ("-DMESHWEN_LANES=4", "-DMESHWEN_DOT"), True),
)


def every_instruction_set(*, int8: bool) -> Iterator[object]:
    """Those of this processor, and what stands in for those it lacks, as parameters of a test.

    Those that differ in int8 alone stand in for its kernels alone.
    """
    if needs_kernels.args[0]:
        return
    here = kernels.supported()
    for one in here:
        yield pytest.param(Kernels(one.name, (), one.has_bf16_dot), id=one.name)
    for one in EMULATED:
        if (int8 or one.has_bf16_dot) and one.name not in {other.name for other in here}:
            yield pytest.param(one, id=f"emulated-{one.name}")


_registrations: dict[str, ctypes.CDLL] = {}


def _registered(one: Kernels) -> str:
    """Compiles the kernels, in a folder that is kept between runs, and tells XLA of them, once."""
    prefix = f"emulated_{one.name}"
    if prefix not in _registrations:
        library = ctypes.CDLL(str(compiled(one)))
        for function in shared_library.FUNCTIONS:
            handler = jax.ffi.pycapsule(getattr(library, f"meshwen_{function}"))
            jax.ffi.register_ffi_target(f"{prefix}_{function}", handler, platform="cpu")
        _registrations[prefix] = library
    return prefix


def compiled(one: Kernels) -> Path:
    sources = sorted(SOURCES.glob("*.c"))
    if not COMMAND:
        pytest.skip("no C compiler to emulate instruction sets with")
    command = [
        *(*COMMAND, "-O2", "-std=c11", "-shared", "-fPIC", "-fvisibility=hidden"),
        "-ffp-contract=off",
        *("-fno-math-errno", "-DMESHWEN_PORTABLE", "-DSUFFIX=portable", *one.flags),
        f"-I{Path(jaxlib.__file__).parent / 'include'}",
    ]
    if platform.machine() == "x86_64":
        command += ["-mavx2", "-mfma"]  # Multiply-adds in hardware: the C library's are slow.
    texts = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    key = hashlib.sha256(b"".join([" ".join(command).encode(), *texts])).hexdigest()[:16]
    folder = Path(__file__).parents[1] / ".pytest_cache" / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{one.name}-{key}.so"
    if not library.exists():
        part = library.with_suffix(f".{hash(str(library)) & 0xFFFF:04x}.part")
        subprocess.run([*command, *map(str, sources), "-o", str(part), "-lm"], check=True)
        part.rename(library)
    return library
