# SPDX-License-Identifier: Apache-2.0
"""What is done for XLA's CPU back end, and for no other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32, Int, Integer, Num

from meshwen.errors import MeshwenError
from meshwen.ops.attention import causal_mask
from meshwen.ops.backend import Backend, CompilerOptions
from meshwen.ops.cache_layout import CacheLayout
from meshwen.ops.cpu import ordered as in_order
from meshwen.runtime.jax_versions import jaxlib_version, multiplies_by_ynnpack

# Up to jax 0.10 XLA takes optimization barriers out before it fuses; later versions afterwards.
_OPTIONS: CompilerOptions = {"xla_disable_hlo_passes": "cse_barrier_expander"}
_ORDERED_OPTIONS: CompilerOptions = _OPTIONS | {
    "xla_cpu_enable_fast_math": False,  # Whatever the user's XLA_FLAGS say.
}
# Only single matmuls go to YNNPACK, no reductions and nothing fused with them: it would
# take those by their size.
_YNNPACK_OPTIONS: CompilerOptions = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}

# XLA's CPU back end takes 8 times as long for a bfloat16 matmul of one row as for one of eight
# rows (all layers of Qwen2.5-0.5B: 485 against 59 ms with jax 0.10, 831 against 60 with 0.12).
_BFLOAT16_ROWS = 8

_LONGEST_BLOCK = 128  # of numbers, in the search for the largest

Bfloat16s = TypeVar("Bfloat16s", Array, tuple[Array, Array])


@dataclass(frozen=True)
class XlaOnCpu(Backend):
    """XLA's CPU back end, simulated devices included.

    Attributes:
        min_rows: matmuls of bfloat16 weights with fewer rows are padded to this many.
    """

    # Heads stand before positions, so that attention's matmuls have their batch dimensions first
    # and the cache need not be laid out anew at each step. Keys [H, S] are read three times as fast
    # as [S, H] (jax 0.10).
    cache_layout: ClassVar[CacheLayout] = CacheLayout(keys="BKHS", values="BKSH")
    # A program takes up to 630 memory maps and 53 MB (24 layers, 8 devices).
    programs: ClassVar[int] = 64

    min_rows: int = _BFLOAT16_ROWS

    def compiler_options(self, ordered: bool) -> CompilerOptions | None:
        """Options of XLA's compiler; `ordered` where sums must keep their order."""
        if not ordered:
            return _OPTIONS
        return _ORDERED_OPTIONS | (_YNNPACK_OPTIONS if multiplies_by_ynnpack() else {})

    def check_ordered(self, dtype: jnp.dtype) -> None:
        """See `Backend.check_ordered`: bfloat16 matmuls have one order in YNNPACK alone."""
        if dtype == jnp.bfloat16 and not multiplies_by_ynnpack():
            raise MeshwenError(
                f"exact numerics in bfloat16 need the kernels or jax 0.8.1, not {jaxlib_version()} "
                "without them: give dtype float32 or numerics fast, or install a newer jax"
            )

    def ordered_matmul(
        self,
        a: Float[Array, "*batch M c"],
        b: Float[Array, "*batch c N"],
        *,
        zeros_behind: bool = False,
    ) -> Float32[Array, "*batch M N"]:
        """a @ b in shapes for which the libraries have one order."""
        return in_order.batched_matmul(a, b, zeros_behind)

    def row_sums(
        self, x: Float[Array, "M c"], *, zeros_behind: bool = False
    ) -> Float32[Array, " M"]:
        """The sum of each row, by a matmul with ones."""
        return in_order.row_sums(x, zeros_behind)

    def block_rows(self, dtype: jnp.dtype) -> int:
        """Of how many rows blocks of an ordered matmul must be a multiple."""
        return in_order.block_rows(dtype)

    def mask(
        self, positions: Int[Array, "B T"], window: int | Array, length: int
    ) -> Float32[Array, "B T {length}"] | None:
        """A number to add: the softmax of 32 rows of 512 scores takes half the time (jax 0.10)."""
        seen, lowest = jnp.float32(0), jnp.float32(jnp.finfo(jnp.float32).min)
        return jnp.where(causal_mask(positions, window, length), seen, lowest)

    # XLA's CPU back end (jax 0.10) writes into a bfloat16 array by converting all of it to float32
    # and back: integers of the same bits take less. One position of rows is written by selection,
    # which takes half to an eighth of an update's time, though it goes through all of the array.

    def write(self, cache: Array, new: Array, start: Array, axis: int) -> Array:
        """See `Backend.write`."""
        if cache.dtype != jnp.bfloat16:
            return super().write(cache, new, start, axis)
        write = _select if new.shape[axis + 1] == 1 else super().write
        return _of_bits(write(_bits(cache), _bits(new), start, axis))

    # KV blocks of bfloat16 are held as integers: what is written is a small part of them.

    def write_blocks(
        self, blocks: tuple[Array, Array], new: tuple[Array, Array], slots: Int[Array, " N"]
    ) -> tuple[Array, Array]:
        """See `Backend.write_blocks`."""
        held = _bits(new) if new[0].dtype == jnp.bfloat16 else new
        return super().write_blocks(blocks, held, slots)

    def empty_blocks(self, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        """See `Backend.empty_blocks`."""
        return super().empty_blocks(
            shape, jnp.dtype(jnp.uint16) if dtype == jnp.bfloat16 else dtype
        )

    def largest(self, x: Num[Array, "B N"]) -> tuple[Num[Array, "B 1"], Integer[Array, "B 1"]]:
        """The largest of each row: the block that has it, then its place there.

        XLA would sort all.
        """
        length = min(x.shape[1] & -x.shape[1], _LONGEST_BLOCK)  # a power of two that divides
        blocks = x.reshape(x.shape[0], -1, length)
        block = jnp.argmax(blocks.max(axis=2), axis=1, keepdims=True)
        numbers = jnp.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0]
        place = jnp.argmax(numbers, axis=1, keepdims=True)
        return jnp.take_along_axis(numbers, place, axis=1), block * length + place

    def _dot_rows(self, x: Array, weight: Array, contract: int) -> Array:
        missing = max(0, self.min_rows - x.shape[0]) if weight.dtype == jnp.bfloat16 else 0
        if missing:
            x = jnp.pad(x, ((0, missing), (0, 0)))
        y = super()._dot_rows(x, weight, contract)
        return y[: y.shape[0] - missing]

    def _ordered_rows(self, x: Array, weight: Array) -> Array:
        return in_order.matmul(x, weight)


def _select(cache: Array, new: Array, start: Array, axis: int) -> Array:
    """The cache with one position of each row, as `Backend.write` writes it."""
    positions = lax.broadcasted_iota(jnp.int32, cache.shape, axis + 1)
    return jnp.where(positions == start[:, None, None, None], new, cache)


def _bits(arrays: Bfloat16s) -> Bfloat16s:
    """bfloat16 numbers as integers of the same bits."""
    return jax.tree.map(lambda a: lax.bitcast_convert_type(a, jnp.uint16), arrays)


def _of_bits(arrays: Bfloat16s) -> Bfloat16s:
    """The bfloat16 numbers of such integers."""
    return jax.tree.map(lambda a: lax.bitcast_convert_type(a, jnp.bfloat16), arrays)
