# SPDX-License-Identifier: Apache-2.0
"""Prefixes out of KV blocks and into them: arrays that neither mesh nor block size shows in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from meshwen.cache.block_pool import NULL_BLOCK
from meshwen.cache.kv_cache import KVCache, LayerCache
from meshwen.engine.prefix_file import Prefix
from meshwen.engine.runner import ModelRunner
from meshwen.models.parallel_model import ParallelModel
from meshwen.parallel.heads import PADDING
from meshwen.weights.declaration import Params

# Blocks that a program moves: one program does for prefixes of any length.
_AT_ONCE = 16
_IN_ORDER = "BSKH"


class PrefixBlocks:
    """Copies keys and values between KV blocks and the host, for the thread that has the engine.

    Args:
        runner: whose blocks they are.
    """

    def __init__(self, runner: ModelRunner):
        self._runner, self._parts = runner, runner.plan.data_devices
        self._size = runner.model.backend.block_size
        self._heads = runner.plan.heads.device_key_value_heads().reshape(-1)
        cache = runner.cache_axes
        self._read = runner.compiled(_read_step, (cache, "batch"), cache)
        self._write = runner.compiled(
            _write_step, (cache, "batch", "length heads head_dim"), cache, donate=(1,)
        )

    def read(self, cache: KVCache, part: int, table: Sequence[int], prefix: Prefix) -> None:
        """Fills a prefix from blocks.

        Args:
            cache: KV blocks.
            part: of the batch, whose blocks they are.
            table: the blocks that hold the prefix; all are full.
            prefix: gets keys and values.
        """
        layout = self._runner.model.backend.cache_layout
        places = [int(np.argmax(self._heads == head)) for head in range(prefix.keys.shape[2])]
        mine = slice(part * _AT_ONCE, (part + 1) * _AT_ONCE)
        for span, blocks in self._groups([table] * self._parts):
            found = self._read(self._runner.params, cache, blocks.reshape(-1))
            for number, layer in enumerate(found):
                for array, axes, to in (
                    (layer.keys, layout.keys, prefix.keys[number, span]),
                    (layer.values, layout.values, prefix.values[number, span]),
                ):
                    own = np.asarray(array)[mine].view(to.dtype)  # bfloat16 may be integers there.
                    own = own.transpose([axes.index(axis) for axis in _IN_ORDER])
                    tokens = own.reshape(-1, *own.shape[2:])[: len(to)]
                    to[:] = tokens[:, places, : to.shape[2]]

    def written(self, cache: KVCache, tables: Sequence[Sequence[int]], prefix: Prefix) -> KVCache:
        """The cache, donated, with a prefix in blocks of parts of the batch.

        Args:
            cache: KV blocks.
            tables: of each part, the blocks that get the prefix, which fills them; or as many null
                blocks, which get nothing.
            prefix: the same for every part.
        """
        for span, blocks in self._groups(tables):
            slots = blocks[..., None] * self._size + np.arange(self._size, dtype=np.int32)
            slots = np.where(blocks[..., None] == NULL_BLOCK, -1, slots).reshape(-1)
            new = tuple(
                LayerCache(self._on_devices(keys[span]), self._on_devices(values[span]))
                for keys, values in zip(prefix.keys, prefix.values, strict=True)
            )
            cache = self._write(self._runner.params, cache, slots, new)
        return jax.block_until_ready(cache)

    def _groups(self, tables: Sequence[Sequence[int]]) -> Iterator[tuple[slice, np.ndarray]]:
        """Which tokens are moved at once, and their blocks, int32 [P, _AT_ONCE]."""
        count = len(tables[0])
        for first in range(0, count, _AT_ONCE):
            last = min(count, first + _AT_ONCE)
            blocks = np.full((self._parts, _AT_ONCE), NULL_BLOCK, np.int32)
            blocks[:, : last - first] = [table[first:last] for table in tables]
            yield slice(first * self._size, last * self._size), blocks

    def _on_devices(self, tokens: np.ndarray) -> Any:
        """Keys or values of tokens [n, K, H] for the devices' heads: copies, and zeros as padding.

        Returns:
            [_AT_ONCE * S, K of all devices, H]
        """
        there = self._heads != PADDING
        shape = _AT_ONCE * self._size, len(self._heads), tokens.shape[2]
        held = np.zeros(shape, tokens.dtype)
        held[: len(tokens), there] = tokens[:, self._heads[there]]
        return held


def _read_step(params: Params, cache: KVCache, blocks: Array, *, model: ParallelModel) -> KVCache:
    return jax.tree.map(lambda array: array[blocks], cache)


def _write_step(
    params: Params, cache: KVCache, slots: Array, new: KVCache, *, model: ParallelModel
) -> KVCache:
    write = model.backend.write_blocks
    return tuple(
        LayerCache(*write(layer, some, slots)) for layer, some in zip(cache, new, strict=True)
    )
