# SPDX-License-Identifier: Apache-2.0
"""What a numerics policy decides: in which order sums are taken, and how functions are rounded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from jax import Array

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
    def matmul_leaves(self, x: Array, weight: Weight, backend: Backend) -> Array:
        """`x @ weight` of a weight whose inputs are split: this device's part of the sum.

        [M, in/n] x [in/n, out], in one leaf or several -> float32 [M, out].
        """

    @abstractmethod
    def all_reduce(self, x: Array, collectives: Collectives) -> Array:
        """The sum of the devices' partial sums: float32 [M, D] -> float32 [M, D]."""

    @abstractmethod
    def select(self, x: Array, collectives: Collectives) -> Array:
        """What one device has and the others have zeros for: float32, any shape."""

    @abstractmethod
    def largest(self, x: Array, collectives: Collectives) -> Array:
        """The largest over the devices: float32 [B] -> float32 [B]."""

    @abstractmethod
    def vocabulary_sum(self, x: Array, backend: Backend, collectives: Collectives) -> Array:
        """The sum over the vocabulary: float32 [B, V/n] -> float32 [B]."""

    @abstractmethod
    def mean(self, x: Array, backend: Backend) -> Array:
        """The mean over the last axis: float32 [..., D] -> float32 [..., 1]."""

    @abstractmethod
    def rounded(self, products: tuple[Array, ...]) -> tuple[Array, ...]:
        """Products that are about to be added up; a compiler might not round them otherwise."""

    @abstractmethod
    def pointwise(self, function: Callable[[Array], Array], x: Array) -> Array:
        """A function of each element, such as exp, of which a compiler has approximations."""
