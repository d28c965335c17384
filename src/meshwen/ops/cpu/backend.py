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
from meshwen.ops.ordered import positive_zeros

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

    stores_scores: ClassVar[bool] = False

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
        """By `meshwen.ops.cpu.kernels.attention`, which has its own exp: see `Backend.attend`."""
        y = kernels.attention(q, *held.located(), mask.start, mask.window, self.alone)
        return positive_zeros(y) if ordered else y

    def mask(self, positions: Int[Array, "B T"], window: int, length: int) -> None:
        """The kernel reads none."""

    def positions_read(self, needed: int, held: int) -> int:
        """All: the kernel reads those to which tokens attend, and one program does for any."""
        return held
