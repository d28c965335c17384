# SPDX-License-Identifier: Apache-2.0
"""What multiplies and attends on a device: here XLA as it is, on any.

Kernels, and what is particular to a back end, are subclasses: `meshwen.ops.cpu`. A model, a
numerics policy or the engine asks the back end, never the platform.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32, Int, Integer, Num, Shaped

from meshwen.common.choices import Quantization, check_choice
from meshwen.ops import ordered as in_order
from meshwen.ops.attention import CausalMask, causal_mask, softmax_attention
from meshwen.ops.cache_layout import CacheLayout, HeldKeysValues
from meshwen.ops.dot import dot
from meshwen.ops.formats import Format, Leaf, multiplied
from meshwen.ops.quant.int8 import INT8

CompilerOptions = dict[str, str | bool]
XLA = "xla"


@dataclass(frozen=True)
class Backend:
    """XLA on any device; static, as programs are compiled for it."""

    cache_layout: ClassVar[CacheLayout] = CacheLayout()
    # Whether attention writes its scores, float32 [heads, tokens, positions], to memory.
    stores_scores: ClassVar[bool] = True
    # How matrices are stored, by the word of `--quantization`; None: as arrays [in, out].
    formats: ClassVar[Mapping[Quantization | None, Format | None]] = {None: None, "int8": INT8}
    # Compiled programs that are kept.
    programs: ClassVar[int] = 512

    def matmul_name(
        self, dtype: jnp.dtype, quantization: Quantization | None, *, ordered: bool = False
    ) -> str:
        """What multiplies rows with weights, as run files name it.

        Of matmuls with the same name, dtype and quantisation an ordered one has the same bits.
        """
        return XLA

    def format(self, quantization: Quantization | None) -> Format | None:
        """How matrices are stored that are multiplied with; None: as arrays [in, out].

        Raises:
            MeshwenError: there is no such quantization here.
        """
        if quantization is not None:
            check_choice("quantization", quantization, [word for word in self.formats if word])
        return self.formats[quantization]

    def compiler_options(self, ordered: bool) -> CompilerOptions | None:
        """Options of XLA's compiler; `ordered` where sums must keep their order."""
        return None

    def check_ordered(self, dtype: jnp.dtype) -> None:
        """Refuses a dtype of weights and cache whose sums are known to have no one order here.

        Raises:
            MeshwenError: the dtype is such.
        """

    def matmul(
        self, x: Float[Array, "M in"], leaf: Leaf, *, ordered: bool = False
    ) -> Float32[Array, "M out"]:
        """x @ leaf.

        Args:
            x: rounded to the weight's dtype, or quantised where the weight is.
            leaf: the weight [in, out].
            ordered: each element's sum has one order of additions, and no result is -0.0.
        """
        x, weight = multiplied(x, leaf)
        if ordered:
            return self._ordered_rows(x, weight)
        return self._dot_rows(x.astype(weight.dtype), weight, 0)

    def matmul_transposed(
        self, x: Float[Array, "M in"], table: Float[Array, "out in"]
    ) -> Float32[Array, "M out"]:
        """x @ table^T, in any order of additions; x is rounded to the table's dtype."""
        return self._dot_rows(x.astype(table.dtype), table, 1)

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

    def attend(
        self,
        q: Float32[Array, "B N T H"],
        held: HeldKeysValues,
        mask: CausalMask,
        exp: Callable[[Array], Array],
        *,
        ordered: bool = False,
    ) -> Float32[Array, "B N T H"]:
        """softmax(q keys^T) values of tokens that follow one another.

        Args:
            q: of the heads of this device, divided by sqrt(H).
            held: keys and values, those of the tokens themselves included.
            mask: where the tokens are, and to which keys they attend.
            exp: the function, as the numerics round it; a kernel may have its own.
            ordered: as in `matmul`.
        """
        keys, values = held.first(mask.length, self.cache_layout)
        assert mask.array is not None, "the mask is of a back end that reads none"
        sums = self if ordered else None
        return softmax_attention(q, keys, values, mask.array, self.cache_layout, exp, sums)

    def mask(
        self, positions: Int[Array, "B T"], window: int, length: int
    ) -> Shaped[Array, "B T {length}"] | None:
        """What `attend` reads as `CausalMask.array`: here whether a token attends to a key."""
        return causal_mask(positions, window, length)

    def positions_read(self, needed: int, held: int) -> int:
        """How many positions of a cache a program reads that needs some of those held.

        XLA reads as many as its arrays have, so programs are compiled for what they need.
        """
        return needed

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
