# SPDX-License-Identifier: Apache-2.0
"""CPUs whose matmuls and attention are the kernels': see `meshwen.ops.cpu.kernels`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int

from meshwen.common.choices import Quantization
from meshwen.ops.attention import CausalMask
from meshwen.ops.cache_layout import HeldKeysValues
from meshwen.ops.cpu import kernels
from meshwen.ops.cpu.panels import COLUMNS, INT8_PANELS, PANELS, Panels
from meshwen.ops.cpu.xla import XlaOnCpu
from meshwen.ops.formats import Format, Leaf
from meshwen.ops.ordered import pad, positive_zeros
from meshwen.ops.paged import PagedMask, PagedTokens

_BLOCK_ROWS = 8


@dataclass(frozen=True)
class CpuKernels(XlaOnCpu):
    """Kernels multiply with weights and attend; XLA does the rest.

    Each sum has one order of additions, by construction.

    Attributes:
        alone: each device does so by one thread, as there are no more threads than devices.
    """

    formats: ClassVar[Mapping[Quantization | None, Format | None]] = {
        None: PANELS,
        "int8": INT8_PANELS,
    }
    alone: bool = False

    def matmul_name(
        self, dtype: jnp.dtype, quantization: Quantization | None, *, ordered: bool = False
    ) -> str:
        """The instructions that multiply rows with weights; "kernels" where none decides bits."""
        name = kernels.name(quantization or dtype)
        if name is None:
            return super().matmul_name(dtype, quantization, ordered=ordered)
        return kernels.ORDERED if ordered else name

    def check_ordered(self, dtype: jnp.dtype) -> None:
        """The kernels have one order: see `Backend.check_ordered`."""

    def matmul(
        self, x: Float[Array, "M in"], leaf: Leaf, *, ordered: bool = False
    ) -> Float32[Array, "M out"]:
        """x @ leaf, by a kernel if it is in panels: see `Backend.matmul`."""
        if not isinstance(leaf, Panels):
            return super().matmul(x, leaf, ordered=ordered)
        y = kernels.matmul(x, leaf, self.alone, ordered=ordered)
        return positive_zeros(y) if ordered else y

    def block_rows(self, dtype: jnp.dtype) -> int:
        """Of how many rows blocks of an ordered matmul must be a multiple."""
        return _BLOCK_ROWS

    def row_sums(
        self, x: Float[Array, "M c"], *, zeros_behind: bool = False
    ) -> Float32[Array, " M"]:
        """The sum of each row, by a kernel's matmul with ones."""
        ones = jnp.ones((1, x.shape[1], COLUMNS, 1), jnp.float32)
        columns = Panels(ones, None, (x.shape[1], COLUMNS), ones.dtype)
        return positive_zeros(kernels.matmul(x, columns, ordered=True)[:, 0])

    def attend(
        self,
        q: Float32[Array, "B N T H"],
        held: HeldKeysValues,
        mask: CausalMask,
        exp: Callable[[Array], Array],
        *,
        ordered: bool = False,
    ) -> Float32[Array, "B N T H"]:
        """By the kernel, to rows cut into blocks: see `Backend.attend`."""
        (B, N, T, H), size = q.shape, self.block_size
        keys, values = (
            _in_blocks(rows, axes.index("S"), size, self.block_head_dim(H) - H, axes.index("H"))
            for rows, axes in zip(
                held.first(mask.length, self.cache_layout),
                (self.cache_layout.keys, self.cache_layout.values),
                strict=True,
            )
        )
        count = len(keys) // B
        tokens = PagedTokens.of(
            (mask.start[:, None] + jnp.arange(T)).reshape(-1),
            jnp.arange(B + 1, dtype=jnp.int32) * T,
            mask.start + T,
            jnp.arange(B * count, dtype=jnp.int32).reshape(B, count),
            size,
        )
        rows = q.swapaxes(1, 2).reshape(B * T, N, H)
        y = self.attend_blocks(
            rows, keys, values, PagedMask(tokens, mask.window), exp, ordered=ordered
        )
        return y.reshape(B, T, N, H).swapaxes(1, 2)

    def attend_blocks(
        self,
        q: Float32[Array, "N heads H"],
        keys: Float[Array, "_ _ _ _"],
        values: Float[Array, "_ _ _ _"],
        mask: PagedMask,
        exp: Callable[[Array], Array],
        *,
        ordered: bool = False,
    ) -> Float32[Array, "N heads H"]:
        """By a kernel, which has its own exp: see `Backend.attend_blocks`."""
        tokens = mask.tokens
        where = (tokens.query_starts, tokens.lengths, tokens.tables)
        y = kernels.paged_attention(q, keys, values, *where, mask.window, self.alone)
        return positive_zeros(y) if ordered else y

    def write_blocks(
        self,
        blocks: tuple[Float[Array, "_ _ _ _"], Float[Array, "_ _ _ _"]],
        new: tuple[Float[Array, "N K H"], Float[Array, "N K H"]],
        slots: Int[Array, " N"],
    ) -> tuple[Float[Array, "_ _ _ _"], Float[Array, "_ _ _ _"]]:
        """In place: see `Backend.write_blocks`."""
        keys, values = kernels.write_cache(*blocks, *new, slots, self.alone)
        return keys, values

    def block_head_dim(self, head_dim: int) -> int:
        """A multiple of what a panel has: see `Backend.block_head_dim`."""
        return -(-head_dim // COLUMNS) * COLUMNS

    def empty_blocks(self, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        """Memory that is taken where it is written first: see `Backend.empty_blocks`."""
        return kernels.unwritten(shape, dtype)

    def mask(self, positions: Int[Array, "B T"], window: int | Array, length: int) -> None:
        """The kernel reads none."""

    def table_width(self, needed: int, most: int) -> int:
        """All: the kernel reads the blocks to which tokens attend, and one program does for any."""
        return most


def _in_blocks(
    rows: Float[Array, "B _ _ _"], axis: int, size: int, missing: int, padded: int
) -> Float[Array, "blocks _ _ _"]:
    """Rows of a cache as KV blocks: those of a row one behind the other.

    Args:
        rows: of one sequence each.
        axis: of positions.
        size: of a block.
        missing: zeros behind the axis `padded`.
    """
    rows = pad(pad(rows, axis, -rows.shape[axis] % size), padded, missing)
    shape = rows.shape
    split = rows.reshape(*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])
    return jnp.moveaxis(split, axis, 1).reshape(-1, *shape[1:axis], size, *shape[axis + 1 :])
