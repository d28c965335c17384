# SPDX-License-Identifier: Apache-2.0
"""A weight on the devices: the one type that every weight of a model has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array

from meshwen.ops.formats import Leaf, Packed


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("leaves",),
    meta_fields=("inputs_first", "tree"),
)
@dataclass(frozen=True)
class Weight:
    """A weight; in a program that devices run, one device's part of it.

    Attributes:
        leaves: what is stored: an array, or a packed matrix. There is one; but a weight whose
            inputs are split has, in exact numerics, one for each leaf of the sum.
        inputs_first: whether the leaves are matrices [in, out]. False: they are as in a checkpoint,
            matrices [out, in], or vectors.
        tree: how the leaves are added: (2, 4) adds four neighbours, twice, then these two. () for
            one leaf.
    """

    leaves: tuple[Leaf, ...]
    inputs_first: bool
    tree: tuple[int, ...] = ()

    @property
    def leaf(self) -> Leaf:
        """What is stored of a weight in one leaf."""
        (leaf,) = self.leaves
        return leaf

    @property
    def array(self) -> Array:
        """The array of a weight that is stored as one: a bias, the weight of a norm, a table."""
        leaf = self.leaf
        if isinstance(leaf, Packed):
            raise TypeError("a packed matrix is no array")
        return leaf

    @property
    def dtype(self) -> jnp.dtype:
        """What it is rounded to; of int8, what is multiplied where no kernel multiplies int8."""
        return self.leaves[0].dtype

    @property
    def outputs(self) -> int:
        """How many outputs there are on this device."""
        return self.leaves[0].shape[1 if self.inputs_first else 0]

    def lookup(self, index: Array) -> Array:
        """The inputs of some outputs, which are rows of a table: int [...] -> [..., in]."""
        leaf = self.leaf
        return leaf.columns(index) if isinstance(leaf, Packed) else jnp.take(leaf, index, axis=0)

    def with_leaf(self, index: int, change: Callable[[Leaf], Leaf]) -> Self:
        """The weight with another leaf in the place of one."""
        leaves = [change(leaf) if i == index else leaf for i, leaf in enumerate(self.leaves)]
        return replace(self, leaves=tuple(leaves))
