# SPDX-License-Identifier: Apache-2.0
"""The shared library of kernels: found, loaded, and told to XLA, once in a process."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import sys
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from threading import Lock

import jax

from meshwen.errors import MeshwenError

# Makes this process use an instruction set that may be less than the fastest; or "none" of them.
VARIABLE = "MESHWEN_INSTRUCTION_SET"
NONE = "none"

_NAME = {"darwin": "libkernels.dylib", "win32": "kernels.dll"}.get(sys.platform, "libkernels.so")
FUNCTIONS = "matmul", "matmul_int8", "paged_attention", "write_cache", "unwritten"

# A clone has what its library was compiled from beside the package; a wheel has not.
_ROOT = (Path(__file__).parent / "../../../../..").resolve()
_SOURCES = _ROOT / "src/meshwen/ops/cpu/csrc"
_SCRIPT = _ROOT / "scripts/build_kernels.py"

logger = logging.getLogger(__name__)
_lock = Lock()


@dataclass(frozen=True)
class InstructionSet:
    """Instructions that kernels are compiled for, and that this processor has.

    Attributes:
        name: in `MESHWEN_INSTRUCTION_SET`, and in what XLA is asked for.
        has_bf16_dot: whether an instruction multiplies pairs of bfloat16, in an order of its own.
    """

    name: str
    has_bf16_dot: bool


def instruction_set() -> InstructionSet | None:
    """The fastest that this processor has, or what `MESHWEN_INSTRUCTION_SET` names; None: none.

    Raises:
        MeshwenError: this processor has not what is named, or there are no kernels at all.
    """
    with _lock:  # XLA refuses a second registration.
        return _chosen(os.environ.get(VARIABLE, ""))


@cache
def _chosen(name: str) -> InstructionSet | None:
    if name == NONE:
        return None
    found = supported()
    if not name:
        return _faster_than_xla(found)
    for one in found:
        if one.name == name:
            return one
    names = ", ".join(one.name for one in found)
    raise MeshwenError(
        f"{VARIABLE}={name}: this processor has kernels for {names or 'nothing'}, or give {NONE}"
    )


def _faster_than_xla(found: tuple[InstructionSet, ...]) -> InstructionSet | None:
    if found and found[0].name == "portable":
        logger.warning(
            "this processor lacks AVX2 and FMA, which meshwen's kernels need, so XLA multiplies; "
            f"{VARIABLE}=portable has the kernels do it in plain C: more slowly, but with the bits "
            "that they have on other processors, as certificates of exact numerics need"
        )
        return None
    return found[0] if found else None


@cache
def supported() -> tuple[InstructionSet, ...]:
    """Those that this processor has, the fastest first; () where the package has no kernels."""
    library = _loaded()
    if library is None:
        return ()
    library.meshwen_instruction_set.restype = ctypes.c_char_p
    found, number = [], 0
    while name := library.meshwen_instruction_set(number):
        if library.meshwen_supported(number):
            has_bf16_dot = bool(library.meshwen_has_bf16_dot(number))
            found.append(InstructionSet(name.decode(), has_bf16_dot))
        number += 1
    return tuple(found)


def compiler() -> str | None:
    """What compiled the kernels, such as "clang 22.1.8 (ziglang 0.17.1)"; None: there are none."""
    library = _loaded() if instruction_set() else None
    return _told(library, "compiler") if library else None


@cache
def _loaded() -> ctypes.CDLL | None:
    """The library, XLA told of its functions; None where the package was built without."""
    resource = files(__package__) / _NAME
    if resource.is_file():
        with as_file(resource) as path:
            return _registered(path)
    logger.warning(
        "this installation of meshwen has no kernels for this processor, so XLA multiplies, which "
        f"is several times slower for some models; {_remedy()}"
    )
    return None


def _remedy() -> str:
    """What gives this installation kernels that are whole."""
    if _in_clone():
        return f"to compile it, run `make kernels` in {_ROOT}, or {sys.executable} {_SCRIPT}"
    return (
        "a wheel of meshwen for this platform has them, and so has an installation from the "
        "sources where a C compiler works (docs/kernels.md)"
    )


def _in_clone() -> bool:
    return _SOURCES.is_dir() and _SCRIPT.is_file()


def _registered(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        functions = {name: getattr(library, f"meshwen_{name}") for name in FUNCTIONS}
    except (OSError, AttributeError) as error:
        raise MeshwenError(
            f"{path} cannot be loaded ({error}): it is damaged or for another platform; {_remedy()}"
        ) from error
    if _in_clone() and _told(library, "sources") != _digest():
        raise MeshwenError(
            f"{path} was compiled from other sources than those of {_SOURCES} and {_SCRIPT.name}, "
            f"or with other flags; {_remedy()}"
        )
    for name, function in functions.items():
        jax.ffi.register_ffi_target(target(name), jax.ffi.pycapsule(function), platform="cpu")
    return library


def _told(library: ctypes.CDLL, what: str) -> str | None:
    """What a library says of its build; None: it is of a version that said nothing."""
    function = getattr(library, f"meshwen_{what}", None)
    if function is None:
        return None
    function.restype = ctypes.c_char_p
    return str(function().decode())


def _digest() -> str:
    """Of what decides the library: see `digest` of scripts/build_kernels.py."""
    paths = (*sorted(_SOURCES.glob("*.[ch]")), _SCRIPT)
    named = (path.name.encode() + b"\0" + path.read_bytes() for path in paths)
    return hashlib.sha256(b"\0".join(named)).hexdigest()


def target(function: str) -> str:
    """What XLA knows a function as."""
    return f"meshwen_{function}"
