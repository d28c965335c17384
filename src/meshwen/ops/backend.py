# SPDX-License-Identifier: Apache-2.0
"""What multiplies and attends on a device: here XLA as it is, on any.

Kernels, and what is particular to a back end, are subclasses: `meshwen.ops.cpu`. A model, a
numerics policy or the engine asks the back end, never the platform.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Float32, Integer, Num, Shaped

from meshwen.common.choices import Quantization
from meshwen.ops import ordered as in_order
from meshwen.ops.dot import dot
from meshwen.ops.formats import Format, Leaf, multiplied
from meshwen.ops.quant.int8 import INT8

CompilerOptions = dict[str, str | bool]
XLA = "xla"
_FORMATS: dict[Quantization | None, Format | None] = {None: None, "int8": INT8}


@dataclass(frozen=True)
class CacheLayout:
    """In which order arrays of the KV cache have their axes.

    B sequences, K key/value heads, S positions, H head_dim. B comes first and K at the same place
    in both.
    """

    keys: str = "BSKH"
    values: str = "BSKH"

    def __post_init__(self) -> None:
        for axes in (self.keys, self.values):
            if sorted(axes) != sorted("BKSH") or axes[0] != "B":
                raise ValueError(f"{axes} is no order of B, K, S, H that begins with B")
        if self.keys.index("K") != self.values.index("K"):  # Both are sharded by one spec.
            raise ValueError(f"heads are not at the same place in {self.keys} and {self.values}")


@dataclass(frozen=True)
class Backend:
    """XLA on any device; static, as programs are compiled for it."""

    cache_layout: ClassVar[CacheLayout] = CacheLayout()
    # Compiled programs that are kept.
    programs: ClassVar[int] = 512
    # Whether `attention` is there, and reads of the cache what a token sees.
    attends: ClassVar[bool] = False

    def matmul_name(self, dtype: jnp.dtype, quantization: Quantization | None) -> str:
        """What multiplies rows with weights."""
        return XLA

    def format(self, quantization: Quantization | None) -> Format | None:
        """How matrices are stored that are multiplied with; None: as arrays [in, out]."""
        return _FORMATS[quantization]

    def compiler_options(self, ordered: bool) -> CompilerOptions | None:
        """Options of XLA's compiler; `ordered` where sums must keep their order."""
        return None

    def matmul(
        self,
        x: Float[Array, "M in"],
        leaf: Leaf,
        *,
        ordered: bool = False,
        transposed: bool = True,
    ) -> Float32[Array, "M out"]:
        """x @ leaf, which is [in, out].

        Args:
            x: rounded to the weight's dtype, or quantised where the weight is.
            leaf: the weight; an array is [out, in] where it is not `transposed`.
            ordered: each element's sum has one order of additions, and no result is -0.0.
            transposed: see `meshwen.ops.weight.Weight`.
        """
        x, weight = multiplied(x, leaf)
        if ordered:
            return self._ordered_rows(x, weight if transposed else weight.T)
        return self._dot_rows(x.astype(weight.dtype), weight, 0 if transposed else 1)

    def ordered_matmul(
        self,
        a: Float[Array, "*batch M c"],
        b: Float[Array, "*batch c N"],
        *,
        zeros_behind: bool = False,
    ) -> Float32[Array, "*batch M N"]:
        """a @ b of activations: see `meshwen.ops.ordered.OrderedSums`."""
        return in_order.batched_matmul(a, b, zeros_behind)

    def row_sums(
        self, x: Float[Array, "M c"], *, zeros_behind: bool = False
    ) -> Float32[Array, " M"]:
        """The sum of each row: see `meshwen.ops.ordered.OrderedSums`."""
        return in_order.row_sums(x)

    def block_rows(self, dtype: jnp.dtype) -> int:
        """Of how many rows blocks of an ordered matmul must be a multiple."""
        return 1

    def attention(
        self, q: Array, keys: Array, values: Array, rows: Array, starts: Array, window: Array
    ) -> Array:
        """Attention of tokens that follow one another, where the back end has a kernel for it."""
        raise NotImplementedError

    def mask(self, visible: Bool[Array, "B T S"]) -> Shaped[Array, "B T S"]:
        """What `masked` takes, of whether a query sees a key."""
        return visible

    def masked(
        self, scores: Float32[Array, "B K G T S"], mask: Shaped[Array, "B T S"]
    ) -> Float32[Array, "B K G T S"]:
        """Scores, the lowest number where a query does not see a key."""
        return jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)

    def write(self, cache: Array, new: Array, start: Array, axis: int) -> Array:
        """The cache with `new` from position start[b] of `axis` on, in each row b.

        Args:
            cache: [B, ...].
            new: the same, but for the length of `axis`, and of the cache's dtype.
            start: int32 [B].
            axis: of positions, counted without B.
        """

        def put(row: Array, update: Array, at: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(row, update, at, axis)

        return jax.vmap(put)(cache, new, start)

    def write_slice(self, cache: Array, new: Array, at: list[Array], write: Array | None) -> Array:
        """The cache with `new`, of the same dtype, at some indices; where `write` is not false."""
        if write is not None:
            new = jnp.where(write, new, lax.dynamic_slice(cache, at, new.shape))
        return lax.dynamic_update_slice(cache, new, at)

    def largest(self, x: Num[Array, "B N"]) -> tuple[Num[Array, "B 1"], Integer[Array, "B 1"]]:
        """The largest of each row, of equals the first: its value and its place."""
        place = jnp.argmax(x, axis=1, keepdims=True)
        return jnp.take_along_axis(x, place, axis=1), place

    def _dot_rows(self, x: Array, weight: Array, contract: int) -> Array:
        """[M, c] times an array whose axis `contract` is c: -> float32 [M, N]."""
        return dot(x, weight, (((1,), (contract,)), ((), ())))

    def _ordered_rows(self, x: Array, weight: Array) -> Array:
        """[M, c] times [c, N] in one order of additions: -> float32 [M, N]."""
        return in_order.matmul(x, weight)
