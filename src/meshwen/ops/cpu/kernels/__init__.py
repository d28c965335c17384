# SPDX-License-Identifier: Apache-2.0
"""Products and attention for x86 CPUs with AVX2 or AVX-512, which the extra `cpu` brings.

XLA's own library lays bfloat16 weights out anew for the processor at every call, which costs a
decode step of 32 rows a third of its time, and adds products up in an order that depends on their
shape; this product takes weights that were packed once, when they were loaded
(`meshwen.ops.cpu.panels`), and adds up in one order (`tiles.py`, `product.ll`; `int8.py`,
`int8.ll`). XLA reads all of the KV cache and writes scores to memory; this attention reads what a
token sees (`attention.ll`). All are LLVM IR, compiled when one is first needed (0.3 to 1 s) by
llvmlite, so that no compiler has to be installed, and called by XLA through its foreign function
interface.
"""

from __future__ import annotations

import importlib.util
import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from meshwen.ops.cpu.kernels import int8, kinds
from meshwen.ops.cpu.kernels.int8 import int8_tiles
from meshwen.ops.cpu.kernels.tiles import all_tiles
from meshwen.ops.cpu.panels import Panels

_WIDTH = 32  # of slots and head dimensions that the attention takes at once
_MANY = 1 << 16  # threads: more than there are


@dataclass(frozen=True)
class InstructionSet:
    """Instructions that kernels are made of; its name tells it from others.

    Attributes:
        name: of the set.
        features: what LLVM calls them.
        registers: what tiles have to fit into.
        products: the kinds of products with weights, by their dtype.
        dots: what multiplies quantised weights.
    """

    name: str
    features: tuple[str, ...] = field(compare=False)
    registers: kinds.Registers = field(compare=False)
    products: Mapping[str, kinds.Kind] = field(compare=False)
    dots: int8.Dots = field(compare=False)


# How attention multiplies float32 numbers with keys and values, by the dtype of these.
_VALUES = {"float32": kinds.FLOAT32, "bfloat16": kinds.MIXED}
_WIDENED = {"float32": kinds.FLOAT32, "bfloat16": kinds.PAIRS}
_PAIRED = {"float32": kinds.FLOAT32, "bfloat16": kinds.BFLOAT16}
# The first that a CPU has is the fastest.
INSTRUCTION_SETS = (
    InstructionSet(
        "avx512_bf16",
        ("avx512f", "avx512bf16", "avx512vnni"),
        kinds.AVX512,
        _PAIRED,
        int8.VNNI_512,
    ),
    InstructionSet("avx512_vnni", ("avx512f", "avx512vnni"), kinds.AVX512, _WIDENED, int8.VNNI_512),
    InstructionSet("avx512", ("avx512f",), kinds.AVX512, _WIDENED, int8.AVX2),
    InstructionSet("avx_vnni", ("avx2", "fma", "avxvnni"), kinds.AVX2, _WIDENED, int8.VNNI_256),
    InstructionSet("avx2", ("avx2", "fma"), kinds.AVX2, _WIDENED, int8.AVX2),
)

# XLA_FFI_Error* product_KIND(XLA_FFI_CallFrame*), and the same of attention, and of all alone.
_ENTRY = """
define ptr @{function}(ptr %frame) {{
  %error = call ptr @{body}(ptr %frame, ptr {kind}, i64 {threads})
  ret ptr %error
}}
"""

logger = logging.getLogger(__name__)
_lock = Lock()


def name(dtype: DTypeLike) -> str | None:
    """The instructions that multiply with weights of a dtype; None where this process has none.

    They need llvmlite and an x86 CPU with AVX2. Warns, once, where llvmlite is there and does not
    do.
    """
    found = instruction_set()
    kind = found.products.get(str(jnp.dtype(dtype))) if found else None
    if not found or not kind:
        return None
    return found.name if kind is kinds.BFLOAT16 else found.registers.name


def int8_name() -> str | None:
    """The instructions that multiply with int8 weights; None where this process has none."""
    found = instruction_set()
    return found.dots.name if found else None


def label() -> str:
    """The name of the instruction set of this process's kernels, or "none"."""
    found = instruction_set()
    return found.name if found else "none"


def matmul(a: Array, b: Panels, alone: bool = False) -> Array:
    """a @ b: [M, K] x [K, N] -> float32 [M, N].

    a is rounded to the weight's dtype; or quantised, where b is, by the same rule: groups of 32 of
    a row, with scales in float32. Every element is added up in one order, from +0.0, whatever M, N
    and the element's place are:

    - runs of 128 steps, one behind the other; within a run k = 0, 1, ..., each step a fused
      multiply-add, or by AVX512-BF16 two products. Subnormal numbers may count as zero.
    - In int8, groups one behind the other, each of 32 products that are added exactly. Groups of a
      whose numbers are all below 1e-36 count as zeros; numbers that are not finite make their row's
      results NaN.

    Args:
        a, b: the factors.
        alone: the thread that calls does all of it. Else the others of XLA's pool help, which is
            slower where they have devices of their own to serve.

    Raises:
        TypeError: their K differ, or b is of another dtype.
        RuntimeError: this process has no kernels.
    """
    if a.shape[1] != b.shape[0]:
        raise TypeError(f"{a.shape} cannot be multiplied with {b.shape}")
    shape = (a.shape[0], b.shape[1])
    if 0 in (*a.shape, *shape):
        return jnp.zeros(shape, jnp.float32)
    found = _required()
    steps, numbers = b.values.shape[1], b.values.shape[3]
    a = a.astype(jnp.float32 if b.scales is not None else b.values.dtype)
    a = jnp.pad(a, ((0, 0), (0, steps * numbers - a.shape[1])))
    if b.scales is not None:
        return _call(found, _function("product", "int8", alone), shape, a, b.values, b.scales)
    kind = found.products.get(str(b.values.dtype))
    if not kind:
        raise TypeError(f"weights of float32, bfloat16 or int8 are multiplied here, not {b.dtype}")
    if kind is kinds.PAIRS:
        a = _widened(a)
    return _call(found, _function("product", kind.name, alone), shape, a, b.values)


def attention(
    q: Array,
    keys: Array,
    values: Array,
    rows: Array,
    starts: Array,
    window: ArrayLike,
    alone: bool = False,
) -> Array:
    """softmax(q keys) values, of tokens that follow one another.

    Token t of sequence b is at slot starts[b] + t of row rows[b], and sees the slots up to its own.
    Its result has the same bits whatever B, T, S and the number of heads are, as long as the values
    are finite.

    Args:
        q: float32 [B, K*G, T, H], scaled.
        keys: bfloat16 or float32 [C, K, H, S].
        values: of the same dtype, [C, K, S, H].
        rows: int32 [B], below C.
        starts: int32 [B], from 0 to S - T; others are clipped.
        window: int32 [], how many slots a token sees at most, its own among them; at least 1.
        alone: see `matmul`.

    Returns:
        float32 [B, K*G, T, H].

    Raises:
        TypeError: other dtypes, or T is more than S.
        RuntimeError: this process has no kernels.
    """
    (C, _, H, S), T = keys.shape, q.shape[2]
    if q.dtype != jnp.float32 or keys.dtype != values.dtype or str(keys.dtype) not in _VALUES:
        raise TypeError(f"no attention for {q.dtype}, {keys.dtype}, {values.dtype}")
    if T > S:
        raise TypeError(f"{T} tokens cannot stand in {S} slots")
    if not q.size:
        return q
    # The kernel itself would read and write beyond.
    rows = jnp.clip(rows, 0, C - 1).astype(jnp.int32)
    starts = jnp.clip(starts, 0, S - T).astype(jnp.int32)
    slots, dimensions = -S % _WIDTH, -H % _WIDTH
    if slots or dimensions:  # Of the rows that are attended to alone: the cache may be large.
        q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, dimensions)))
        keys = _padded_rows(keys, rows, dimensions, slots)
        values = _padded_rows(values, rows, slots, dimensions)
        rows = jnp.arange(len(q), dtype=jnp.int32)
    most = jnp.maximum(window, 1).astype(jnp.int32).reshape(1)
    found = _required()
    kind = _VALUES[str(values.dtype)]
    function = _function("attention", kind.name, alone)
    return _call(found, function, q.shape, q, keys, values, rows, starts, most)[..., :H]


def instruction_set() -> InstructionSet | None:
    """The fastest that the CPU has, its kernels compiled; None where there can be none."""
    with _lock:  # XLA refuses a second registration.
        return _fastest()


def _required() -> InstructionSet:
    found = instruction_set()
    if not found:
        raise RuntimeError("kernels need the extra cpu and an x86 CPU with AVX2")
    return found


def _padded_rows(cache: Array, rows: Array, *missing: int) -> Array:
    """Some rows, with zeros behind the last two axes.

    The barrier keeps XLA from fusing into it what was just written to the cache: that would be
    written to a copy, as the fusion still reads what was there before.
    """
    some = lax.optimization_barrier(cache)[rows]
    return jnp.pad(some, ((0, 0), (0, 0), *((0, count) for count in missing)))


def _widened(x: Array) -> Array:
    """bfloat16 as float32. XLA would drop a conversion there and back, and the rounding with it."""
    bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
    return lax.bitcast_convert_type(bits, jnp.float32)


def _function(what: str, kind: str, alone: bool) -> str:
    return f"{what}_{kind}_alone" if alone else f"{what}_{kind}"


def _call(of: InstructionSet, function: str, shape: tuple[int, ...], *arguments: Array) -> Array:
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.ffi.ffi_call(_target(of, function), result)(*arguments)


def _target(of: InstructionSet, function: str) -> str:
    """What XLA knows a function as."""
    return f"meshwen_{of.name}_{function}"


@cache
def _fastest() -> InstructionSet | None:
    # Windows lacks functions of the C library that they call.
    if platform.machine() != "x86_64" or not importlib.util.find_spec("llvmlite"):
        return None
    try:
        found = next(iter(supported()), None)
        if found:
            compiled(found)
        return found
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        logger.warning(
            "llvmlite is installed, but cannot compile the kernels (%s): XLA multiplies; "
            "pip install 'meshwen[cpu]' for a version that can",
            reason,
        )
        return None


@cache
def supported() -> tuple[InstructionSet, ...]:
    """Those that the CPU has, the fastest first; needs llvmlite."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    return tuple(
        one for one in INSTRUCTION_SETS if all(features.get(name) for name in one.features)
    )


@cache
def compiled(of: InstructionSet) -> Any:
    """Compiles the kernels of an instruction set and tells XLA of them.

    Returns:
        llvmlite's engine, which owns the machine code.
    """
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(_assembly(of))
    module.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
    )
    # Code generation inlines nothing by itself: this does, what is marked `alwaysinline`.
    passes = llvm.create_new_module_pass_manager()
    passes.add_always_inliner_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    for function in _functions(of):
        handler = jax.ffi.pycapsule(engine.get_function_address(function))
        jax.ffi.register_ffi_target(_target(of, function), handler, platform="cpu")
    return engine


def _functions(of: InstructionSet) -> dict[str, str]:
    """What XLA calls, by name: a function for each kind of product and attention, shared or not."""
    bodies = [("product", kind.name, "product") for kind in of.products.values()]
    bodies += [("attention", kind.name, "attention") for kind in _VALUES.values()]
    bodies += [("product", "int8", "int8")]
    return {
        _function(what, kind, alone): _ENTRY.format(
            function=_function(what, kind, alone),
            body=body,
            kind="null" if kind == "int8" else f"@kind_{kind}",
            threads=1 if alone else _MANY,
        )
        for what, kind, body in bodies
        for alone in (False, True)
    }


def _assembly(of: InstructionSet) -> str:
    """All functions, in LLVM's language."""
    texts = [
        files(__package__).joinpath(f"{file}.ll").read_text(encoding="utf-8")
        for file in ("share", "product", "attention", "int8")
    ]
    used = dict.fromkeys([*of.products.values(), *_VALUES.values()])
    texts += [all_tiles(kind, of.registers) for kind in used]
    texts += [int8_tiles(of.dots)]
    return "\n".join([*texts, *_functions(of).values(), kinds.declarations(of.registers)])
