# SPDX-License-Identifier: Apache-2.0
"""Matmuls with weights, attention and the paged KV cache on CPUs, by kernels in C (`ops/cpu/csrc`).

XLA's own library lays bfloat16 weights out anew for the processor at every call, which costs a
decode step of 32 rows a third of its time, and adds products up in an order that depends on their
shape; these matmuls take weights that were packed once, when they were loaded
(`meshwen.ops.cpu.panels`), and add up in one order. XLA reads all of the KV cache and writes scores
to memory; this attention reads what a token sees. XLA calls them through its foreign function
interface.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, Float32, Int

from meshwen.ops.cpu.kernels.shared_library import (
    InstructionSet,
    compiler,
    instruction_set,
    supported,
    target,
)
from meshwen.ops.cpu.panels import Panels

__all__ = [
    "ORDERED",
    "InstructionSet",
    "compiler",
    "instruction_set",
    "label",
    "matmul",
    "name",
    "paged_attention",
    "supported",
    "unwritten",
    "write_cache",
]

# What ordered matmuls of all instruction sets are named by: their bits are the same.
ORDERED = "kernels"

_MANY = 1 << 16  # threads: more than there are
_DTYPES = ("float32", "bfloat16")


def name(dtype: DTypeLike) -> str | None:
    """The instructions that multiply with weights of a dtype, int8 too; None: there are none."""
    found = instruction_set()
    return found.name if found and str(jnp.dtype(dtype)) in (*_DTYPES, "int8") else None


def label() -> str:
    """The name of the instruction set of this process's kernels, or "none"."""
    found = instruction_set()
    return found.name if found else "none"


def matmul(a: Array, b: Panels, alone: bool = False, *, ordered: bool = False) -> Array:
    """a @ b: [M, K] x [K, N] -> float32 [M, N].

    a is rounded to the weight's dtype; or quantised, where b is, by the same rule: groups of 32 of
    a row, with scales in float32. Every element is added up in one order, from +0.0, whatever M, N
    and the element's place are:

    - runs of 128 numbers, one behind the other; within a run k = 0, 1, ..., each a fused
      multiply-add. Not `ordered`, and where an instruction multiplies pairs of bfloat16, runs are
      128 pairs, each of which it adds up and rounds in its own way.
    - In int8, groups one behind the other, each of 32 products that are added exactly. Groups of a
      whose numbers are all below 1e-36 count as zeros; numbers that are not finite make their row's
      results NaN.

    Args:
        a, b: the factors.
        alone: the thread that calls does all of it. Else the others of XLA's pool help, which is
            slower where they have devices of their own to serve.
        ordered: by the same rule on every processor.

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
        return _call(found, "matmul_int8", shape, alone, a, b.values, b.scales)
    if str(b.values.dtype) not in _DTYPES:
        raise TypeError(f"weights of float32, bfloat16 or int8 are multiplied here, not {b.dtype}")
    if a.dtype == jnp.bfloat16 and (ordered or not found.has_bf16_dot):
        a = _widened(a)
    return _call(found, "matmul", shape, alone, a, b.values)


def paged_attention(
    q: Float32[Array, "N heads h"],
    keys: Float[Array, "P K H S"],
    values: Float[Array, "P K S H"],
    query_starts: Int[Array, " starts"],
    lengths: Int[Array, " R"],
    tables: Int[Array, "R W"],
    window: ArrayLike,
    alone: bool = False,
) -> Float32[Array, "N heads h"]:
    """softmax(q keys) values, of the last tokens of sequences whose keys and values are in blocks.

    A token's result has the same bits whatever else is attended to, and wherever the blocks are, as
    long as the values are finite. Nothing is read of positions that no token
    sees, but keys in the same 32 positions, which count for nothing.

    Args:
        q: scaled; of h dimensions, at most H; the heads are a multiple of K.
        keys: the pool: float32 or bfloat16, H and S multiples of 32. The dimensions behind h are
            not read.
        values: of the same dtype.
        query_starts: R + 1 of them, non-decreasing, from 0 to N. The tokens query_starts[r] to
            query_starts[r + 1] are of sequence r; those of none have the result 0.0.
        lengths: the positions of each sequence, of which its tokens are the last.
        tables: position p of sequence r is in block tables[r, p // S] at p % S. What is behind the
            length, or before all windows, may be anything.
        window: [], how many positions a token sees at most, its own among them; at least 1.
        alone: see `matmul`.

    Raises:
        TypeError: other dtypes or shapes.
        RuntimeError: this process has no kernels; when it runs, XLA's error of what would be
            outside of the pool.
    """
    if q.dtype != jnp.float32 or keys.dtype != values.dtype or str(keys.dtype) not in _DTYPES:
        raise TypeError(f"no attention for {q.dtype}, {keys.dtype}, {values.dtype}")
    if not q.size:
        return q
    integers = (x.astype(jnp.int32) for x in (query_starts, lengths, tables))
    most = jnp.asarray(window, jnp.int32).reshape(1)
    arguments = (q, keys, values, *integers, most)
    return _call(_required(), "paged_attention", q.shape, alone, *arguments)


def write_cache(
    keys: Float[Array, "P K H S"],
    values: Float[Array, "P K S H"],
    new_keys: Float[Array, "N K h"],
    new_values: Float[Array, "N K h"],
    slots: Int[Array, " N"],
    alone: bool = False,
) -> tuple[Float[Array, "P K H S"], Float[Array, "P K S H"]]:
    """The pool with keys and values of tokens written to it, in place.

    Where the pool is not needed afterwards, nothing of it is copied; so it has to be donated to the
    program. A reader of the pool as it was has XLA copy it:

        step = jax.jit(write_cache, donate_argnums=(0, 1))
        keys, values = step(keys, values, new_keys, new_values, slots)

    Args:
        keys, values: the pool: see `paged_attention`.
        new_keys, new_values: of its dtype, h at most H; behind them zeros are written.
        slots: block * S + offset of each token, or -1: it is not written. Of tokens with the same
            slot the last is.
        alone: see `matmul`.

    Raises:
        TypeError: other dtypes.
        RuntimeError: this process has no kernels; when it runs, XLA's error of a slot that is not
            in the pool.
    """
    if len({x.dtype for x in (keys, values, new_keys, new_values)}) > 1:
        raise TypeError(f"{new_keys.dtype} cannot be written to a cache of {keys.dtype}")
    found = _required()
    pool = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, values))
    call = jax.ffi.ffi_call(target("write_cache"), pool, input_output_aliases={0: 0, 1: 1})
    new = new_keys, new_values, slots.astype(jnp.int32)
    keys, values = call(keys, values, *new, **_attributes(found, alone))
    return keys, values


def unwritten(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """An array of memory that was never written: what it holds means nothing.

    On Linux it takes resident memory only where it is written later.

    Raises:
        RuntimeError: this process has no kernels.
    """
    _required()
    # The effect keeps XLA from making one array of two calls that are alike.
    call = jax.ffi.ffi_call(
        target("unwritten"), jax.ShapeDtypeStruct(shape, dtype), has_side_effect=True
    )
    return call()


def _required() -> InstructionSet:
    found = instruction_set()
    if not found:
        raise RuntimeError("this installation, or this process, has no kernels")
    return found


def _widened(x: Array) -> Array:
    """bfloat16 as float32. XLA would drop a conversion there and back, and the rounding with it."""
    bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
    return lax.bitcast_convert_type(bits, jnp.float32)


def _call(
    of: InstructionSet, function: str, shape: tuple[int, ...], alone: bool, *arguments: Array
) -> Array:
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    call = jax.ffi.ffi_call(target(function), result)
    return call(*arguments, **_attributes(of, alone))


def _attributes(of: InstructionSet, alone: bool) -> dict[str, str | np.int64]:
    """What calls say beside their arguments."""
    return {"instruction_set": of.name, "threads": np.int64(1 if alone else _MANY)}
