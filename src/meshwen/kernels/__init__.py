# SPDX-License-Identifier: Apache-2.0
"""Products and attention for x86 CPUs with AVX-512, which the extra `cpu` brings.

XLA's own library lays bfloat16 weights out anew for the processor at every call, which costs a
decode step of 32 rows a third of its time, and adds products up in an order that depends on their
shape; this product takes weights as they are, in one order (`tiles.py`, `product.ll`). XLA reads
all of the KV cache and writes scores to memory; this attention reads what a token sees
(`attention.ll`). Both are LLVM IR, compiled when one is first needed (0.3 s) by llvmlite, so that
no compiler has to be installed, and called by XLA through its foreign function interface.
"""

from __future__ import annotations

import importlib.util
import logging
import platform
from functools import cache
from importlib.resources import files
from threading import Lock
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from meshwen.kernels import tiles

# The instructions that the kernels of a dtype need, as LLVM calls them, and what we call them.
_FEATURES = {"float32": "avx512f", "bfloat16": "avx512bf16"}
_NAMES = {"float32": "avx512", "bfloat16": "avx512_bf16"}
# The tiles of their products with weights, and of those of attention's weights with values.
_KINDS = {
    "float32": (tiles.FLOAT32, tiles.FLOAT32),
    "bfloat16": (tiles.BFLOAT16, tiles.MIXED),
}
_WIDTH = 32  # of slots and head dimensions that the attention takes at once

# XLA_FFI_Error* product_DTYPE(XLA_FFI_CallFrame*), and the same of attention.
_ENTRY = """
define ptr @product_{dtype}(ptr %frame) {{
  %error = call ptr @multiply(ptr %frame, i64 {bytes}, ptr @tiles_{dtype}, ptr @wide_{dtype})
  ret ptr %error
}}

define ptr @attention_{dtype}(ptr %frame) {{
  %error = call ptr @attend(ptr %frame, i64 {bytes}, ptr @tiles_{values})
  ret ptr %error
}}
"""

logger = logging.getLogger(__name__)
_lock = Lock()


def name(dtype: DTypeLike) -> str | None:
    """What the kernels for weights of a dtype are called; None where this process has none.

    They need llvmlite and a CPU with AVX-512, those for bfloat16 also AVX512-BF16. Warns, once,
    where llvmlite is there and does not do.
    """
    with _lock:  # XLA refuses a second registration.
        code = _machine_code()
    found = str(jnp.dtype(dtype))
    return _NAMES[found] if code and found in code.dtypes else None


def names() -> list[str]:
    """The names of all kernels that this process has."""
    return [found for dtype in _NAMES if (found := name(dtype))]


def product(a: Array, b: Array) -> Array:
    """a @ b: [M, K] x [K, N] -> float32 [M, N], both bfloat16 or both float32.

    Every element is added up in one order, from +0.0, whatever M, N and the element's place are:
    runs of 512 bytes of a row of a, one behind the other; within a run k = 0, 1, ..., float32 by
    fused multiply-adds, bfloat16 two products at a time. Subnormal numbers may count as zero.

    Raises:
        TypeError: a and b are not of one of the two dtypes.
    """
    if a.dtype != b.dtype or str(a.dtype) not in _NAMES:
        raise TypeError(f"bfloat16 or float32 is multiplied here, not {a.dtype} and {b.dtype}")
    N = b.shape[1]
    if 0 in (*a.shape, N):
        return jnp.zeros((a.shape[0], N), jnp.float32)
    odd = a.shape[1] % 2 if a.dtype == jnp.bfloat16 else 0  # It takes pairs.
    missing = max(0, tiles.COLUMNS - N)
    if odd or missing:
        a, b = jnp.pad(a, ((0, 0), (0, odd))), jnp.pad(b, ((0, odd), (0, missing)))
    return _call("product", a.dtype, (a.shape[0], b.shape[1]), a, b)[:, :N]


def attends_to(head_dim: int) -> bool:
    """Whether `attention` takes heads of so many dimensions."""
    return head_dim % _WIDTH == 0


def attention(
    q: Array, keys: Array, values: Array, rows: Array, starts: Array, window: ArrayLike
) -> Array:
    """softmax(q keys) values, of tokens that follow one another.

    Token t of sequence b is at slot starts[b] + t of row rows[b], and sees the slots up to its own.
    Its result has the same bits whatever B, T, S and the number of heads are, as long as the values
    are finite.

    Args:
        q: float32 [B, K*G, T, H], scaled; H is a multiple of 32.
        keys: float32 [C, K, H, S].
        values: bfloat16 or float32 [C, K, S, H].
        rows: int32 [B], below C.
        starts: int32 [B], from 0 to S - T; others are clipped.
        window: int32 [], how many slots a token sees at most, its own among them; at least 1.

    Returns:
        float32 [B, K*G, T, H].

    Raises:
        TypeError: other dtypes, or another H, or T is more than S.
    """
    (C, _, H, S), T = keys.shape, q.shape[2]
    if q.dtype != jnp.float32 or keys.dtype != jnp.float32 or str(values.dtype) not in _NAMES:
        raise TypeError(f"no attention for {q.dtype}, {keys.dtype}, {values.dtype}")
    if not attends_to(H):
        raise TypeError(f"no attention for heads of {H} dimensions, no multiple of {_WIDTH}")
    if T > S:
        raise TypeError(f"{T} tokens cannot stand in {S} slots")
    if not q.size:
        return q
    # The kernel itself would read and write beyond.
    rows = jnp.clip(rows, 0, C - 1).astype(jnp.int32)
    starts = jnp.clip(starts, 0, S - T).astype(jnp.int32)
    missing = -S % _WIDTH
    if missing:
        keys = jnp.pad(keys, ((0, 0), (0, 0), (0, 0), (0, missing)))
        values = jnp.pad(values, ((0, 0), (0, 0), (0, missing), (0, 0)))
    most = jnp.maximum(window, 1).astype(jnp.int32).reshape(1)
    return _call("attention", values.dtype, q.shape, q, keys, values, rows, starts, most)


def _call(function: str, dtype: jnp.dtype, shape: tuple[int, ...], *arguments: Array) -> Array:
    if not name(dtype):
        raise RuntimeError(
            f"kernels for {dtype} need the extra cpu and a CPU with {_NAMES[str(dtype)]}"
        )
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.ffi.ffi_call(f"meshwen_{function}_{dtype}", result)(*arguments)


class _MachineCode(NamedTuple):
    engine: Any  # llvmlite's, which owns it
    dtypes: list[str]  # of weights that it is for


@cache
def _machine_code() -> _MachineCode | None:
    """Compiles the functions and tells XLA of them; None where there can be none."""
    # Windows lacks functions of the C library that they call.
    if platform.machine() != "x86_64" or not importlib.util.find_spec("llvmlite"):
        return None
    try:
        return _compiled()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        logger.warning(
            "llvmlite is installed, but cannot compile the AVX-512 kernels (%s): XLA multiplies; "
            "pip install 'meshwen[cpu]' for a version that can",
            reason,
        )
        return None


def _compiled() -> _MachineCode | None:
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    dtypes = [dtype for dtype, feature in _FEATURES.items() if features.get(feature)]
    if not dtypes:
        return None
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(_assembly(dtypes))
    module.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=2
    )
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    for function in ("product", "attention"):
        for dtype in dtypes:
            handler = jax.ffi.pycapsule(engine.get_function_address(f"{function}_{dtype}"))
            jax.ffi.register_ffi_target(f"meshwen_{function}_{dtype}", handler, platform="cpu")
    return _MachineCode(engine, dtypes)


def _assembly(dtypes: list[str]) -> str:
    """All functions, in LLVM's language."""
    texts = [
        files(__package__).joinpath(f"{file}.ll").read_text(encoding="utf-8")
        for file in ("share", "product", "attention")
    ]
    kinds = dict.fromkeys(kind for dtype in dtypes for kind in _KINDS[dtype])
    texts += [tiles.tiles(kind) for kind in kinds]
    for dtype in dtypes:
        values = _KINDS[dtype][1].name
        texts.append(_ENTRY.format(dtype=dtype, bytes=jnp.dtype(dtype).itemsize, values=values))
    return "\n".join([*texts, tiles.INTRINSICS, tiles.widths()])
