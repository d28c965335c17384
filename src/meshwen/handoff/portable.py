# SPDX-License-Identifier: Apache-2.0
"""The portable profile: what a compiler needs that knows few operations.

Such a compiler has no pattern for `partition_id`, `case`, `while`, scatters over a batch, or
`dynamic_update_slice`. So a device learns its number from an argument, and the cache is written at
positions that all sequences share. A written position is found again if its index leads back to
an argument, so the positions are one too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float32, Int32

from meshwen.ops.attention import CausalMask, softmax_attention
from meshwen.ops.backend import Backend
from meshwen.ops.cache_layout import CacheLayout, HeldKeysValues
from meshwen.ops.operations import Linear, Ops
from meshwen.parallel.collectives import Collectives

# What the programs consist of, as operations of StableHLO; composites and function calls, too.
OPERATIONS = frozenset(
    (
        *("add", "subtract", "multiply", "divide", "negate", "maximum", "minimum"),
        *("exponential", "logistic", "rsqrt", "cosine", "sine"),
        *("compare", "and", "select", "convert", "constant", "iota"),
        *("broadcast_in_dim", "reshape", "transpose", "slice", "concatenate"),
        *("dot_general", "reduce", "gather", "scatter", "all_reduce"),
        *("optimization_barrier", "composite"),
    )
)


@dataclass(frozen=True)
class NumberedDevices(Collectives):
    """Collectives of devices that are told their numbers.

    Attributes:
        number: int32 [1], this device's.
    """

    number: Array | None = None

    def index(self) -> Array | int:
        """This device's number among those that split the model."""
        assert self.number is not None
        return self.number.reshape(()) if self.axes else 0


@dataclass(frozen=True)
class SharedPositions(Backend):
    """XLA as it is, but for the cache: [B, heads, positions, head_dim], written by one scatter.

    Attributes:
        positions: int32 [T], of the tokens of every sequence.
    """

    cache_layout: ClassVar[CacheLayout] = CacheLayout(keys="BKSH", values="BKSH")

    positions: Array | None = None

    def write(self, cache: Array, new: Array, start: Array, axis: int) -> Array:
        """The cache with `new` at the positions; `start` is the first of them."""
        assert axis == 1
        return cache.at[:, :, self.positions].set(new)


class CompositeOps(Ops):
    """Operations of which norms and attention are composites, named as Tenstorrent's compiler
    looks for them; one that does not know these takes what they consist of.
    """

    def rms_norm(
        self, x: Float32[Array, "*rows D"], layer: Linear, eps: float
    ) -> Float32[Array, "*rows D"]:
        """`tenstorrent.rms_norm` of x and the norm's weight."""
        weight = layer["weight"]

        def decomposition(  # type: ignore[no-untyped-def]
            x: Array, array: Array, *, normalized_shape: object, epsilon: float
        ):
            layer = {"weight": replace(weight, leaves=(array,))}
            return super(CompositeOps, self).rms_norm(x, layer, epsilon)

        norm = lax.composite(decomposition, "tenstorrent.rms_norm")
        shape = np.array([x.shape[-1]], np.int64)
        y: Array = norm(x, weight.array, normalized_shape=shape, epsilon=eps)
        return y

    def attend(
        self, q: Float32[Array, "B N T H"], held: HeldKeysValues, mask: CausalMask
    ) -> Float32[Array, "B N T H"]:
        """`tenstorrent.scaled_dot_product_attention` of q, keys, values and a mask to add."""
        layout = self.backend.cache_layout
        keys, values = held.first(mask.length, layout)
        assert mask.array is not None
        added = jnp.where(mask.array, np.float32(0), jnp.finfo(jnp.float32).min)[:, None]

        def decomposition(  # type: ignore[no-untyped-def]
            q: Array, keys: Array, values: Array, added: Array, *, is_causal: bool, scale: float
        ):
            return softmax_attention(q, keys, values, added[:, 0], layout, jnp.exp, None)

        attention = lax.composite(decomposition, "tenstorrent.scaled_dot_product_attention")
        # q is divided by sqrt(H) already.
        y: Array = attention(q, keys, values, added, is_causal=False, scale=1.0)
        return y


def portable_ops(
    own: Ops,
    number: Int32[Array, " 1"],
    positions: Int32[Array, " T"] | None = None,
    *,
    composites: bool = False,
) -> Ops:
    """A model's operations, of a device with this number, for tokens at these positions."""
    kind = CompositeOps if composites else Ops
    collectives = NumberedDevices(own.collectives.axes, number)
    return kind(collectives, own.numerics, SharedPositions(positions))
