# SPDX-License-Identifier: Apache-2.0
"""The shared library of kernels: found, loaded, and told to XLA, once in a process."""

from __future__ import annotations

import ctypes
import logging
import os
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

_NAMES = ("libkernels.so", "libkernels.dylib", "kernels.dll")
_FUNCTIONS = ("matmul", "matmul_int8", "attention")

logger = logging.getLogger(__name__)
_lock = Lock()


@dataclass(frozen=True)
class InstructionSet:
    """Instructions that kernels are compiled for, and that this processor has.

    Attributes:
        name: in `MESHWEN_INSTRUCTION_SET`, and in what XLA is asked for.
        pairs: whether an instruction multiplies pairs of bfloat16, in an order of its own.
    """

    name: str
    pairs: bool


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
        # Portable C multiplies more slowly than XLA.
        return next((one for one in found if one.name != "portable"), None)
    for one in found:
        if one.name == name:
            return one
    names = ", ".join([*(one.name for one in found), NONE])
    raise MeshwenError(f"{VARIABLE}={name}: this processor has kernels for {names}")


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
            pairs = bool(library.meshwen_multiplies_pairs(number))
            found.append(InstructionSet(name.decode(), pairs))
        number += 1
    return tuple(found)


@cache
def _loaded() -> ctypes.CDLL | None:
    """The library, XLA told of its functions; None where the package was built without."""
    folder = files(__package__)
    for name in _NAMES:
        if not (resource := folder / name).is_file():
            continue
        with as_file(resource) as path:
            return _registered(path)
    logger.warning(
        "this installation of meshwen has no kernels for this processor, so XLA multiplies, which "
        "is several times slower for some models; a wheel has them, and so has an installation "
        "from the sources where a C compiler is found"
    )
    return None


def _registered(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for function in _FUNCTIONS:
        handler = jax.ffi.pycapsule(getattr(library, f"meshwen_{function}"))
        jax.ffi.register_ffi_target(target(function), handler, platform="cpu")
    return library


def target(function: str) -> str:
    """What XLA knows a function as."""
    return f"meshwen_{function}"
