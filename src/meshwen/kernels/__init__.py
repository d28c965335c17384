# SPDX-License-Identifier: Apache-2.0
"""A bfloat16 matrix product for x86 CPUs with AVX512-BF16, which the extra `cpu` brings.

XLA's own library lays the weights out anew for the processor at every call. That costs a decode
step of 32 rows a third of its time. This product takes them as they are: see `tiles.py`. It is LLVM
IR, compiled when it is first needed (0.2 s) by llvmlite, so that no compiler has to be installed,
and called by XLA through its foreign function interface.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
from functools import cache
from importlib.resources import files
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from meshwen.kernels.tiles import COLUMNS, tiles

NAME = "avx512_bf16"

_TARGET = f"meshwen_{NAME}"


@cache
def available() -> bool:
    """Whether this process can use the product: llvmlite is there, and the CPU has AVX512-BF16."""
    if platform.machine() not in ("x86_64", "AMD64") or not importlib.util.find_spec("llvmlite"):
        return False
    import llvmlite.binding as llvm

    return bool(llvm.get_host_cpu_features().get("avx512bf16"))


def bfloat16_product(a: Array, b: Array) -> Array:
    """a @ b: bfloat16 [M, K] x bfloat16 [K, N] -> float32 [M, N].

    Every element is added up in the order k = 0, 1, ..., two products at a time, from +0.0,
    whatever M, N and the element's place are; products of subnormal numbers count as zero.
    """
    _register()
    N = b.shape[1]
    odd, missing = a.shape[1] % 2, max(0, COLUMNS - N)
    if odd or missing:
        a, b = jnp.pad(a, ((0, 0), (0, odd))), jnp.pad(b, ((0, odd), (0, missing)))
    shape = jax.ShapeDtypeStruct((a.shape[0], b.shape[1]), jnp.float32)
    return jax.ffi.ffi_call(_TARGET, shape)(a, b)[:, :N]


@cache
def _register() -> Any:
    """Compiles the product and tells XLA of it; returns what owns the machine code."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    source = files(__package__).joinpath("handler.ll").read_text(encoding="utf-8")
    module = llvm.parse_assembly(source + tiles())
    module.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
    )
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype = ctypes.py_object
    capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    handler = capsule(engine.get_function_address("handler"), None, None)
    jax.ffi.register_ffi_target(_TARGET, handler, platform="cpu")
    return engine
