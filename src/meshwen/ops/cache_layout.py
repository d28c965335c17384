# SPDX-License-Identifier: Apache-2.0
"""What back ends say of the KV cache, and what they read of it; `meshwen.cache` has the caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jax import Array


@dataclass(frozen=True)
class CacheLayout:
    """In which order arrays of the KV cache have their axes.

    B sequences, K key/value heads, S positions, H head_dim; of KV blocks, B blocks of S positions.
    B comes first and K at the same place in both.
    """

    keys: str = "BSKH"
    values: str = "BSKH"

    def __post_init__(self) -> None:
        for axes in (self.keys, self.values):
            if sorted(axes) != sorted("BKSH") or axes[0] != "B":
                raise ValueError(f"{axes} is no order of B, K, S, H that begins with B")
        if self.keys.index("K") != self.values.index("K"):  # Both are sharded by one spec.
            raise ValueError(f"heads are not at the same place in {self.keys} and {self.values}")


@runtime_checkable  # For checks of shapes.
class HeldKeysValues(Protocol):
    """Keys and values of one layer in rows, one a sequence: what `Backend.attend` reads."""

    def first(self, length: int, layout: CacheLayout) -> tuple[Array, Array]:
        """Keys and values of the first positions, [B, ...] in the order of `layout`."""


def axes_in_order(x: Array, axes: str, order: str) -> Array:
    """`x`, whose axes are named by letters, with them in another order."""
    return x if axes == order else x.transpose([axes.index(axis) for axis in order])
