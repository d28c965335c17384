# SPDX-License-Identifier: Apache-2.0
"""What a model computes with, on the part of a device: the one object that its functions take.

Tensor parallelism enters a model through three contractions, Megatron-LM's scheme (arXiv
1909.08053):

- column-parallel: the output is split, nothing is communicated;
- row-parallel: the input is split, partial sums are added over the devices;
- vocabulary-parallel: the table's rows are split; a lookup finds a row on one device and zeros on
  the others, which are added; logits stay split.

Matmuls take their inputs in the weights' dtype and accumulate and return float32; so partial sums
are also added in float32, and bfloat16 costs no more accuracy on many devices than on one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int, Shaped

from meshwen.ops.attention import CausalMask
from meshwen.ops.backend import Backend
from meshwen.ops.cache_layout import HeldKeysValues
from meshwen.ops.numerics.base import Numerics
from meshwen.ops.numerics.fast import Fast
from meshwen.ops.paged import PagedMask
from meshwen.ops.weight import Weight
from meshwen.parallel.collectives import Collectives

# A linear layer's weights: "weight", and "bias" where it has one.
Linear = Mapping[str, Weight]


@dataclass(frozen=True)
class Ops:
    """Operations of one device; without arguments, of the only one.

    Attributes:
        collectives: how the devices that split the model communicate.
        numerics: how sums are ordered and functions rounded.
        backend: what multiplies and attends.
    """

    collectives: Collectives = field(default_factory=Collectives)
    numerics: Numerics = field(default_factory=Fast)
    backend: Backend = field(default_factory=Backend)

    def column(self, x: Float[Array, "*rows in"], layer: Linear) -> Float32[Array, "*rows out"]:
        """A linear layer, output split: times [in, out/n]."""
        return _with_bias(self._matmul(x, layer["weight"]), layer)

    def row(self, x: Float[Array, "*rows in"], layer: Linear) -> Float32[Array, "*rows out"]:
        """A linear layer, input split: times [in/n, out]. Every device has all of its bias."""
        weight = layer["weight"]
        partial = self.numerics.matmul_leaves(x.reshape(-1, x.shape[-1]), weight, self.backend)
        total = self.numerics.all_reduce(partial, self.collectives)
        return _with_bias(total.reshape(*x.shape[:-1], weight.outputs), layer)

    def embed(self, token_ids: Int[Array, "*tokens"], layer: Linear) -> Float32[Array, "*tokens D"]:
        """Rows of a table [V/n, D] that is split by rows."""
        table = layer["weight"]
        count = table.outputs
        row = token_ids - self.collectives.index() * count
        here = (row >= 0) & (row < count)
        # Typed: jax 0.7 lowers Python's numbers by the setting of whoever lowers, x64 or not.
        row = jnp.where(here, row, np.int32(0))
        rows = jnp.where(here[..., None], table.lookup(row).astype(jnp.float32), np.float32(0))
        return self.numerics.select(rows, self.collectives)

    def logits(self, x: Float32[Array, "*tokens D"], layer: Linear) -> Float32[Array, "*tokens V"]:
        """Logits of a head, or of a tied table [V/n, D], split over the vocabulary."""
        weight = layer["weight"]
        if weight.inputs_first:
            return _with_bias(self._matmul(x, weight), layer)
        assert not self.numerics.ordered, "exact numerics have a head beside a tied table"
        y = self.backend.matmul_transposed(x.reshape(-1, x.shape[-1]), weight.array)
        return _with_bias(y.reshape(*x.shape[:-1], y.shape[-1]), layer)

    def attend(
        self, q: Float32[Array, "B N T H"], held: HeldKeysValues, mask: CausalMask
    ) -> Float32[Array, "B N T H"]:
        """Attention of this device's heads: see `Backend.attend`."""
        exp = partial(self.numerics.pointwise, jnp.exp)
        return self.backend.attend(q, held, mask, exp, ordered=self.numerics.ordered)

    def attend_blocks(
        self,
        q: Float32[Array, "N heads H"],
        keys: Shaped[Array, "_ _ _ _"],
        values: Shaped[Array, "_ _ _ _"],
        mask: PagedMask,
    ) -> Float32[Array, "N heads H"]:
        """Attention to KV blocks: see `Backend.attend_blocks`."""
        exp = partial(self.numerics.pointwise, jnp.exp)
        ordered = self.numerics.ordered
        return self.backend.attend_blocks(q, keys, values, mask, exp, ordered=ordered)

    def rms_norm(
        self, x: Float32[Array, "*rows D"], layer: Linear, eps: float
    ) -> Float32[Array, "*rows D"]:
        """Root-mean-square norm (arXiv 1910.07467) over the last axis, in float32."""
        mean_square = self.numerics.mean(jnp.square(x), self.backend)
        scale = self.numerics.inverse_sqrt(mean_square + eps)
        return x * scale * layer["weight"].array.astype(jnp.float32)

    def silu(self, x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """x * sigmoid(x)."""
        return self.numerics.pointwise(jax.nn.silu, x)

    def _matmul(self, x: Float[Array, "*rows in"], weight: Weight) -> Float32[Array, "*rows out"]:
        """Times a weight in one leaf."""
        rows, ordered = x.reshape(-1, x.shape[-1]), self.numerics.ordered
        y = self.backend.matmul(rows, weight.leaf, ordered=ordered)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def _with_bias(y: Float32[Array, "*rows out"], layer: Linear) -> Float32[Array, "*rows out"]:
    """A layer's whole sums with its bias, if it has one: each is rounded once."""
    return y + layer["bias"].array.astype(jnp.float32) if "bias" in layer else y
