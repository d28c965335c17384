# SPDX-License-Identifier: Apache-2.0
"""Products and attention in bfloat16 for x86 CPUs with AVX512-BF16, which the extra `cpu` brings.

XLA's own library lays the weights out anew for the processor at every call, which costs a decode
step of 32 rows a third of its time; this product takes them as they are (`tiles.py`). XLA reads all
of the KV cache and writes its scores to memory; this attention reads what a token sees
(`attend.py`). Both are LLVM IR, compiled when one is first needed (0.2 s) by llvmlite, so that no
compiler has to be installed, and called by XLA through its foreign function interface.
"""

from __future__ import annotations

import importlib.util
import logging
import platform
from functools import cache
from importlib.resources import files
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from meshwen.kernels.attend import MOST_QUERIES, WIDTH, attends
from meshwen.kernels.tiles import COLUMNS, tiles

NAME = "avx512_bf16"

logger = logging.getLogger(__name__)
_lock = Lock()


def available() -> bool:
    """Whether this process can use the kernels: llvmlite is there, and the CPU has AVX512-BF16.

    Warns, once, where llvmlite is there and does not do.
    """
    with _lock:  # XLA refuses a second registration.
        return _machine_code() is not None


def product(a: Array, b: Array) -> Array:
    """a @ b: bfloat16 [M, K] x bfloat16 [K, N] -> float32 [M, N].

    Every element is added up in the order k = 0, 1, ..., two products at a time, from +0.0,
    whatever M, N and the element's place are; products of subnormal numbers count as zero.

    Raises:
        TypeError: a or b is not bfloat16.
    """
    if not a.dtype == b.dtype == jnp.bfloat16:
        raise TypeError(f"bfloat16 is multiplied here, not {a.dtype} and {b.dtype}")
    N = b.shape[1]
    odd, missing = a.shape[1] % 2, max(0, COLUMNS - N)
    if odd or missing:
        a, b = jnp.pad(a, ((0, 0), (0, odd))), jnp.pad(b, ((0, odd), (0, missing)))
    return _call("product", (a.shape[0], b.shape[1]), a, b)[:, :N]


def attends_to(q: Array, keys: Array, values: Array) -> bool:
    """Whether `attention` takes these shapes and dtypes."""
    N, T, H = q.shape[1:]
    K, S = keys.shape[1], keys.shape[3]
    sizes = T == 1 and N // K <= MOST_QUERIES and H % WIDTH == 0 and S % WIDTH == 0
    return sizes and keys.dtype == jnp.float32 and values.dtype == jnp.bfloat16


def attention(q: Array, keys: Array, values: Array, first: Array, last: Array) -> Array:
    """softmax(q keys) values over the slots `first` to `last`, of one token a sequence.

    Args:
        q: float32 [B, K*G, 1, H], scaled.
        keys: float32 [B, K, H, S].
        values: bfloat16 [B, K, S, H].
        first: int32 [B].
        last: int32 [B], from `first` on, below S; others are clipped.

    Returns:
        float32 [B, K*G, 1, H].

    Raises:
        TypeError: `attends_to` refuses them.
    """
    if not attends_to(q, keys, values):
        raise TypeError("these shapes or dtypes are not for this attention: see attends_to")
    last = jnp.clip(last, 0, keys.shape[3] - 1)  # The kernel itself would write beyond its scores.
    first = jnp.clip(first, 0, last)
    return _call("attention", q.shape, q, keys, values, first, last)


def _call(name: str, shape: tuple[int, ...], *arguments: Array) -> Array:
    if not available():
        raise RuntimeError(f"the {NAME} kernels need the extra cpu and a CPU with AVX512-BF16")
    return jax.ffi.ffi_call(_target(name), jax.ShapeDtypeStruct(shape, jnp.float32))(*arguments)


def _target(name: str) -> str:
    """The name under which XLA knows a function."""
    return f"meshwen_{NAME}_{name}"


@cache
def _machine_code() -> Any:
    """Compiles the functions and tells XLA of them.

    Returns:
        What owns the machine code; None where there can be none.
    """
    if platform.machine() not in ("x86_64", "AMD64") or not importlib.util.find_spec("llvmlite"):
        return None
    try:
        return _compiled()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        logger.warning(
            "llvmlite is installed, but cannot compile the %s kernels (%s): XLA multiplies; "
            "pip install 'meshwen[cpu]' for a version that can",
            NAME,
            reason,
        )
        return None


def _compiled() -> Any:
    import llvmlite.binding as llvm

    if not llvm.get_host_cpu_features().get("avx512bf16"):
        return None
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    texts = [
        files(__package__).joinpath(f"{name}.ll").read_text(encoding="utf-8")
        for name in ("share", "product", "attention")
    ]
    module = llvm.parse_assembly("\n".join([*texts, tiles(), attends()]))
    module.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
    )
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    for name in ("product", "attention"):
        handler = jax.ffi.pycapsule(engine.get_function_address(name))
        jax.ffi.register_ffi_target(_target(name), handler, platform="cpu")
    return engine
