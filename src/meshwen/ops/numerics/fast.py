# SPDX-License-Identifier: Apache-2.0
"""Fast numerics: sums in whatever order is fastest, functions as the compiler rounds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32

from meshwen.ops.backend import Backend
from meshwen.ops.dot import dot
from meshwen.ops.numerics.base import Numerics
from meshwen.ops.weight import Weight
from meshwen.parallel.collectives import Collectives


@dataclass(frozen=True)
class Fast(Numerics):
    """The fastest program. Partial sums of devices are added in float32, by all-reduces."""

    ordered: ClassVar[bool] = False

    def matmul_leaves(
        self, x: Float[Array, "M in"], weight: Weight, backend: Backend
    ) -> Float32[Array, "M out"]:
        """`x @ weight`, of which there is one leaf."""
        return backend.matmul(x, weight.leaf)

    def all_reduce(
        self, x: Float32[Array, "M D"], collectives: Collectives
    ) -> Float32[Array, "M D"]:
        """An all-reduce, in XLA's order."""
        return collectives.all_reduce(x)

    def select(
        self, x: Float32[Array, "*shape"], collectives: Collectives
    ) -> Float32[Array, "*shape"]:
        """An all-reduce."""
        return collectives.all_reduce(x)

    def largest(self, x: Float32[Array, " B"], collectives: Collectives) -> Float32[Array, " B"]:
        """An all-reduce."""
        return collectives.all_reduce_max(x)

    def vocabulary_sum(
        self, x: Float32[Array, "B V"], backend: Backend, collectives: Collectives
    ) -> Float32[Array, " B"]:
        """A matmul with ones.

        It adds 150,000 terms in many partial sums, an order more exactly than a running sum does.
        """
        ones = jnp.ones((x.shape[1], 1), jnp.float32)
        return collectives.all_reduce(dot(x, ones, (((1,), (0,)), ((), ())))[:, 0])

    def mean(self, x: Float32[Array, "*rows D"], backend: Backend) -> Float32[Array, "*rows 1"]:
        """XLA's mean."""
        return x.mean(axis=-1, keepdims=True)

    def rounded(self, values: tuple[Array, ...]) -> tuple[Array, ...]:
        """The values; a compiler may keep more of them."""
        return values

    def pointwise(
        self, function: Callable[[Array], Array], x: Float32[Array, "*shape"]
    ) -> Float32[Array, "*shape"]:
        """The function; a compiler may approximate it as it likes."""
        return function(x)

    def inverse_sqrt(self, x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """What the processor has for it."""
        return lax.rsqrt(x)
