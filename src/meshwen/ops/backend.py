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
from meshwen.ops import paged
from meshwen.ops.attention import CausalMask, causal_mask, softmax_attention
from meshwen.ops.cache_layout import CacheLayout, HeldKeysValues
from meshwen.ops.dot import dot
from meshwen.ops.formats import Format, Leaf, multiplied
from meshwen.ops.paged import PagedMask
from meshwen.ops.quant.int8 import INT8
from meshwen.runtime.shape_buckets import shape_bucket

CompilerOptions = dict[str, str | bool]
XLA = "xla"


@dataclass(frozen=True)
class Backend:
    """XLA on any device; static, as programs are compiled for it."""

    cache_layout: ClassVar[CacheLayout] = CacheLayout()
    # Positions of a KV block.
    block_size: ClassVar[int] = 32
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

    def attend_blocks(
        self,
        q: Float32[Array, "N heads H"],
        keys: Shaped[Array, "_ _ _ _"],
        values: Shaped[Array, "_ _ _ _"],
        mask: PagedMask,
        exp: Callable[[Array], Array],
        *,
        ordered: bool = False,
    ) -> Float32[Array, "N heads H"]:
        """The same of tokens whose keys and values, their own included, are in KV blocks.

        Args:
            q: of the heads of this device, divided by sqrt(H).
            keys, values: the blocks.
            mask: where the tokens are, and to which keys they attend.
            exp: as in `attend`.
            ordered: as in `matmul`.
        """
        sums = self if ordered else None
        return paged.attention(q, keys, values, mask, self.mask, self.cache_layout, exp, sums)

    def write_blocks(
        self,
        blocks: tuple[Shaped[Array, "_ _ _ _"], Shaped[Array, "_ _ _ _"]],
        new: tuple[Shaped[Array, "N K H"], Shaped[Array, "N K H"]],
        slots: Int[Array, " N"],
    ) -> tuple[Shaped[Array, "_ _ _ _"], Shaped[Array, "_ _ _ _"]]:
        """KV blocks, keys and values, with those of tokens, of the same dtype, at their places.

        Args:
            blocks: keys and values.
            new: the tokens'.
            slots: see `meshwen.ops.paged.PagedTokens`.
        """
        layout = self.cache_layout
        keys = paged.written(blocks[0], new[0], slots, layout.keys)
        return keys, paged.written(blocks[1], new[1], slots, layout.values)

    def block_head_dim(self, head_dim: int) -> int:
        """H of KV blocks, of at least the model's: what is behind that is of no account."""
        return head_dim

    def empty_blocks(self, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        """KV blocks that nothing has been written to: of any numbers, NaN too."""
        return jnp.zeros(shape, dtype)

    def mask(
        self, positions: Int[Array, "B T"], window: int, length: int
    ) -> Shaped[Array, "B T {length}"] | None:
        """What `attend` reads as `CausalMask.array`: here whether a token attends to a key."""
        return causal_mask(positions, window, length)

    def table_width(self, needed: int, most: int) -> int:
        """How many blocks a program's block tables have that needs some of at most so many.

        XLA gathers whole tables, so programs are compiled for what they need.
        """
        return min(shape_bucket(needed, smallest=1), most)

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
