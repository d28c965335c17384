# SPDX-License-Identifier: Apache-2.0
"""What a numerics policy decides: in which order sums are taken, and how functions are rounded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from jax import Array
from jaxtyping import Float, Float32

from meshwen.ops.backend import Backend
from meshwen.ops.weight import Weight
from meshwen.parallel.collectives import Collectives


class Numerics(ABC):
    """A policy; static, so that a program compiled under one is compiled under no other.

    Attributes:
        ordered: whether every sum has one order of additions, whatever its shape. Back ends are
            asked for such matmuls and such attention.
    """

    ordered: ClassVar[bool]

    @abstractmethod
    def matmul_leaves(
        self, x: Float[Array, "M in"], weight: Weight, backend: Backend
    ) -> Float32[Array, "M out"]:
        """`x @ weight` of a weight whose inputs are split: this device's part of the sum."""

    @abstractmethod
    def all_reduce(
        self, x: Float32[Array, "M D"], collectives: Collectives
    ) -> Float32[Array, "M D"]:
        """The sum of the devices' partial sums."""

    @abstractmethod
    def select(
        self, x: Float32[Array, "*shape"], collectives: Collectives
    ) -> Float32[Array, "*shape"]:
        """What one device has and the others have zeros for."""

    @abstractmethod
    def largest(self, x: Float32[Array, " B"], collectives: Collectives) -> Float32[Array, " B"]:
        """The largest over the devices."""

    @abstractmethod
    def vocabulary_sum(
        self, x: Float32[Array, "B V"], backend: Backend, collectives: Collectives
    ) -> Float32[Array, " B"]:
        """The sum over the vocabulary, of which each device has a part."""

    @abstractmethod
    def mean(self, x: Float32[Array, "*rows D"], backend: Backend) -> Float32[Array, "*rows 1"]:
        """The mean over the last axis."""

    @abstractmethod
    def rounded(self, values: tuple[Array, ...]) -> tuple[Array, ...]:
        """Values that are about to be used further, at the precision of their dtype.

        A compiler may keep more: of products that are added, of what was converted to bfloat16.
        """

    @abstractmethod
    def pointwise(
        self, function: Callable[[Array], Array], x: Float32[Array, "*shape"]
    ) -> Float32[Array, "*shape"]:
        """A function of each element, such as exp, of which a compiler has approximations."""

    @abstractmethod
    def inverse_sqrt(self, x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """1 / sqrt(x) of each element."""
