# SPDX-License-Identifier: Apache-2.0
"""Which query heads and which key/value heads each device of a tensor-parallel mesh holds.

Every device runs the same program, so every device must hold the same number of things: K key/value
heads, each with G query heads. Qwen2.5's head counts rarely divide by the mesh (28 query and 4
key/value heads on 8 or 32 devices), so

- each key/value head's group of query heads is cut into `pieces` of G consecutive heads, and there
  is one copy of a key/value head with each of its pieces, mostly on different devices;
- what does not fill up is padded. A padding head has zero rows in the query projection and in the
  output projection: it adds exactly nothing, and no head is ever dropped.

Pieces are dealt to devices in order, so neighbours share key/value heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from meshwen.errors import MeshwenError

PADDING = -1


@dataclass(frozen=True)
class HeadLayout:
    """The heads of one model on `devices` tensor-parallel devices.

    Attributes:
        devices: number of tensor-parallel devices n.
        query_heads: query heads of the model.
        key_value_heads: key/value heads of the model.
        local_key_value_heads: K, key/value heads (copies included) on each device.
        group_size: G, query heads for each of a device's key/value heads, padding included.
    """

    devices: int
    query_heads: int
    key_value_heads: int
    local_key_value_heads: int
    group_size: int

    @property
    def pieces(self) -> int:
        """Into how many pieces each key/value head's group of query heads is cut.

        As many as there is room for, so that all key/value heads have equally many copies; the
        last pieces may be empty.
        """
        return self.devices * self.local_key_value_heads // self.key_value_heads

    @property
    def local_query_heads(self) -> int:
        """Query heads on each device, padding included: N = K * G."""
        return self.local_key_value_heads * self.group_size

    @property
    def padding_query_heads(self) -> int:
        """Query heads, over all devices, that are padding."""
        return self.devices * self.local_query_heads - self.query_heads

    @property
    def key_value_copies(self) -> float:
        """Key/value heads on all devices, for each of the model."""
        return self.devices * self.local_key_value_heads / self.key_value_heads

    def device_key_value_heads(self) -> np.ndarray:
        """The model's key/value head at each place: int [n, K], `PADDING` where there is none."""
        piece = np.arange(self.devices * self.local_key_value_heads)
        head = piece // self.pieces
        head[head >= self.key_value_heads] = PADDING
        return head.reshape(self.devices, self.local_key_value_heads)

    def device_query_heads(self) -> np.ndarray:
        """The model's query head at each place: int [n, K, G], `PADDING` where there is none."""
        group = self.query_heads // self.key_value_heads
        piece = np.arange(self.devices * self.local_key_value_heads)
        within = (piece % self.pieces)[:, None] * self.group_size + np.arange(self.group_size)
        head = (piece // self.pieces)[:, None] * group + within
        head[(within >= group) | (piece[:, None] // self.pieces >= self.key_value_heads)] = PADDING
        return head.reshape(self.devices, self.local_key_value_heads, self.group_size)


def as_lists(heads: np.ndarray) -> Any:
    """Heads as nested lists, with None for padding: what JSON holds of a layout."""
    if heads.ndim == 0:
        return None if heads == PADDING else int(heads)
    return [as_lists(part) for part in heads]


def head_layout(query_heads: int, key_value_heads: int, devices: int) -> HeadLayout:
    """The layout of least cost on `devices` devices, for any head counts and any device count.

    A query head costs its rows of the query and output projections, a key/value head the same in
    the key and value projections and its part of the cache; so the least `query + key/value heads`
    a device is chosen, and among equals the smallest cache.

    Args:
        query_heads: query heads; a multiple of `key_value_heads`.
        key_value_heads: key/value heads.
        devices: tensor-parallel devices, at least 1.

    Raises:
        ValueError: a count is below 1, or `query_heads` is no multiple of `key_value_heads`.
    """
    if min(query_heads, key_value_heads, devices) < 1 or query_heads % key_value_heads:
        raise ValueError(
            f"no head layout for {query_heads} query and {key_value_heads} key/value heads "
            f"on {devices} devices"
        )
    group = query_heads // key_value_heads
    candidates = []
    for size in range(1, group + 1):
        local = ceil(key_value_heads * ceil(group / size) / devices)
        candidates.append(HeadLayout(devices, query_heads, key_value_heads, local, size))
    return min(
        candidates,
        key=lambda c: (c.local_query_heads + c.local_key_value_heads, c.local_key_value_heads),
    )


def subtree_head_layout(query_heads: int, key_value_heads: int, devices: int) -> HeadLayout:
    """The layout whose pieces have partial sums that are subtrees of one tree on every mesh.

    A group of query heads is padded to a power of two, and pieces are halves, quarters, ...
    of these. A piece that is a whole group leaves its padding out: an addend of exactly zero.

    Args:
        query_heads: query heads; a multiple of `key_value_heads`.
        key_value_heads: key/value heads; a power of two.
        devices: tensor-parallel devices; a power of two.

    Raises:
        MeshwenError: the number of key/value heads is no power of two.
    """
    if key_value_heads & (key_value_heads - 1):
        raise MeshwenError(
            f"exact numerics needs a power of two of key/value heads, not {key_value_heads}; "
            "use fast numerics"
        )
    group = query_heads // key_value_heads
    copies = max(1, devices // key_value_heads)
    size = max(1, (1 << (group - 1).bit_length()) // copies)
    return HeadLayout(
        devices, query_heads, key_value_heads, max(1, key_value_heads // devices), min(group, size)
    )
