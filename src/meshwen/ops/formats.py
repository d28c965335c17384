# SPDX-License-Identifier: Apache-2.0
"""How the numbers of a matrix are stored: as an array, or packed.

A format is chosen by the back end (`Backend.format`), which multiplies with what is stored. Formats
of one back end, or of a quantisation, are in files of their own: `meshwen.ops.cpu.panels`,
`meshwen.ops.quant.int8`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf, prod
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Bounds:
    """How far results on two meshes may be apart in fast numerics, as sums have other orders there.

    Attributes:
        sampler_shortfall: of the sampler's token behind the likeliest, in units of the largest
            logit: the sampler's own program may round otherwise than the one that gives logits.
        max_relative: of single logits, in units of the largest; infinite where no bound would be
            of use.
        mean_kl, max_kl: Kullback-Leibler divergence, the mean over positions and of each.
    """

    sampler_shortfall: float
    max_relative: float = inf
    mean_kl: float = inf
    max_kl: float = inf


class Packed(ABC):
    """A matrix [in, out] that is not stored as an array of its shape; a pytree of arrays.

    The first axis of the arrays runs along the outputs, the second along the inputs. So what is
    split over devices is their parts one behind the other.

    Attributes:
        shape: (in, out) of a device's part, without padding.
        dtype: what its numbers are rounded to; of quantised ones, what they are multiplied as where
            no kernel multiplies them as they are.
        format: what packs it.
    """

    shape: tuple[int, int]
    dtype: jnp.dtype

    @property
    @abstractmethod
    def format(self) -> Format:
        """What packs it."""

    @abstractmethod
    def unpacked(self) -> Array:
        """One device's part: [in, out] in its dtype."""

    @abstractmethod
    def times(self, factors: Array) -> Packed:
        """One device's part with each number times a factor, where nothing is rounded again.

        Args:
            factors: [in, out] of -1, 0 and 1.
        """

    def repackable(self) -> Array:
        """One device's part [out, in], as a checkpoint has it: `Format.pack` gives the same bits.

        In its dtype; of a format that rounds, float32.
        """
        return self.unpacked().T

    def columns(self, index: Array) -> Array:
        """Columns of one device's part: int [...] -> [..., in]."""
        raise TypeError(f"columns of {self.format.name} cannot be looked up")


# What is stored of a weight.
Leaf = Array | Packed
AnyPacked = TypeVar("AnyPacked", bound=Packed)


class Format(ABC):
    """A way to store a matrix; static."""

    name: str
    outputs: int  # that share an element of the first axis

    @abstractmethod
    def pack(self, part: Array, dtype: jnp.dtype) -> Packed:
        """Packs one device's part.

        Args:
            part: [out, in], as in a checkpoint, of any floating-point dtype.
            dtype: float32 or bfloat16.
        """

    @abstractmethod
    def wrap(self, arrays: list[Array], shape: tuple[int, int], dtype: jnp.dtype) -> Packed:
        """A packed matrix of its arrays, in the order of its pytree; (in, out) of a device."""

    @abstractmethod
    def nbytes(self, shape: tuple[int, int], dtype: jnp.dtype) -> int:
        """Bytes of a device's part [out, in]."""

    @property
    @abstractmethod
    def bounds(self) -> Bounds | None:
        """What `verify` holds results to where numbers are rounded to less than the dtype.

        None: they are not, and the bounds are those of the dtype.
        """

    @property
    def rounds(self) -> bool:
        """Whether numbers are rounded to less than the dtype."""
        return self.bounds is not None


def multiplied(x: Array, leaf: Leaf) -> tuple[Array, Array]:
    """`x`, which is about to be multiplied with a leaf, and the leaf as an array.

    The barrier keeps a compiler from unpacking all of a model's weights before any is needed.
    """
    if not isinstance(leaf, Packed):
        return x, leaf
    packed, x = jax.lax.optimization_barrier((leaf, x))
    return x, packed.unpacked()


def array_bytes(shape: tuple[int, ...], dtype: jnp.dtype) -> int:
    """Bytes of an array."""
    return prod(shape) * dtype.itemsize
