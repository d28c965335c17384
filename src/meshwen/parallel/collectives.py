# SPDX-License-Identifier: Apache-2.0
"""Communication between the devices that split a model, inside `shard_map`."""

from __future__ import annotations

from dataclasses import dataclass

from jax import Array, lax


@dataclass(frozen=True)
class Collectives:
    """Collectives over the mesh axes that split the model; with () there is one device.

    Attributes:
        axes: the mesh axes, in row-major order.
    """

    axes: tuple[str, ...] = ()

    @property
    def devices(self) -> int:
        """Devices that split the model: n."""
        return lax.axis_size(self.axes) if self.axes else 1

    def index(self) -> Array | int:
        """This device's number among them."""
        return lax.axis_index(self.axes) if self.axes else 0

    def all_reduce(self, x: Array) -> Array:
        """The sum of `x` over the devices; of floating-point numbers, in an order XLA chooses."""
        return lax.psum(x, self.axes) if self.axes else x

    def all_reduce_max(self, x: Array) -> Array:
        """The largest `x` of the devices, element by element."""
        return lax.pmax(x, self.axes) if self.axes else x

    def all_gather(self, x: Array, axis: int) -> Array:
        """The devices' `x` behind one another along an axis that is there."""
        return lax.all_gather(x, self.axes, axis=axis, tiled=True) if self.axes else x

    def stack(self, x: Array) -> Array:
        """The devices' `x` along a new first axis: [...] -> [n, ...]."""
        return lax.all_gather(x, self.axes) if self.axes else x[None]

    def all_to_all(self, x: Array) -> Array:
        """Every device's share of all: [M, n, ...], share i for device i -> [n, M, ...]."""
        if not self.axes:
            return x
        # Tiled, which has a derivative; then whose share it is becomes an axis.
        shares = lax.all_to_all(x, self.axes, split_axis=1, concat_axis=0, tiled=True)
        return shares.reshape(x.shape[1], x.shape[0], *x.shape[2:])
