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
from meshwen.ops.cache_layout import axes_in_order
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
        self._heads = runner.plan.heads.device_key_value_heads().reshape(-1)
        one_part = runner.cache_axes.replace("batch", "length")  # Every part gets the same.
        self._read = runner.compiled(_read_step, (runner.cache_axes, "batch"), runner.cache_axes)
        self._write = runner.compiled(
            _write_step, (runner.cache_axes, "batch", one_part), runner.cache_axes, donate=(1,)
        )

    def read(self, cache: KVCache, part: int, table: Sequence[int], prefix: Prefix) -> None:
        """Fills a prefix from blocks.

        Args:
            cache: KV blocks.
            part: of the batch, whose blocks they are.
            table: the blocks that hold the prefix; all are full.
            prefix: gets keys and values.
        """
        places = np.array(
            [np.flatnonzero(self._heads == h)[0] for h in range(prefix.keys.shape[2])]
        )
        for span, blocks in self._groups([table if i == part else () for i in range(self._parts)]):
            found = self._read(self._runner.params, cache, blocks)
            for number, layer in enumerate(found):
                for target, array, axes in self._arrays(prefix, number, layer):
                    own = np.asarray(array)[part * _AT_ONCE : (part + 1) * _AT_ONCE]
                    tokens = axes_in_order(own, axes, _IN_ORDER)  # type: ignore[arg-type]
                    tokens = tokens.reshape(-1, *tokens.shape[2:])[: span.stop - span.start]
                    target[span] = tokens[:, places, : target.shape[2]]

    def written(self, cache: KVCache, tables: Sequence[Sequence[int]], prefix: Prefix) -> KVCache:
        """The cache, donated, with a prefix in blocks of every part of the batch.

        Args:
            cache: KV blocks.
            tables: of each part, the blocks that get the prefix: as many as it fills.
            prefix: what does not fill a block is left out.
        """
        for span, blocks in self._groups(tables):
            new = tuple(
                LayerCache(*(self._new(source[span], axes) for source, _, axes in arrays))
                for arrays in (self._arrays(prefix, i, layer) for i, layer in enumerate(cache))
            )
            cache = self._write(self._runner.params, cache, blocks, new)
        return jax.block_until_ready(cache)

    def _groups(self, tables: Sequence[Sequence[int]]) -> Iterator[tuple[slice, np.ndarray]]:
        """Which tokens are moved at once, and their blocks, int32 [P * _AT_ONCE]."""
        size, count = self._runner.model.backend.block_size, max(map(len, tables))
        for first in range(0, count, _AT_ONCE):
            blocks = np.full((self._parts, _AT_ONCE), NULL_BLOCK, np.int32)
            for row, table in zip(blocks, tables, strict=True):
                some = table[first : first + _AT_ONCE]
                row[: len(some)] = some
            last = min(count, first + _AT_ONCE)
            yield slice(first * size, last * size), blocks.reshape(-1)

    def _arrays(
        self, prefix: Prefix, number: int, layer: LayerCache
    ) -> Iterator[tuple[np.ndarray, Array, str]]:
        """A layer's keys and values: of the prefix, [T, K, H], in blocks, and their axes there."""
        layout = self._runner.model.backend.cache_layout
        yield prefix.keys[number], layer.keys, layout.keys
        yield prefix.values[number], layer.values, layout.values

    def _new(self, tokens: np.ndarray, axes: str) -> Any:
        """Blocks of tokens [n, K, H] for the devices: with copies of heads, zeros as padding."""
        backend, (count, _, head_dim) = self._runner.model.backend, tokens.shape
        H, size = backend.block_head_dim(head_dim), backend.block_size
        held = np.zeros((_AT_ONCE * size, len(self._heads), H), tokens.dtype)
        there = self._heads != PADDING
        held[:count, there, :head_dim] = tokens[:, self._heads[there]]
        blocks = held.reshape(_AT_ONCE, size, *held.shape[1:])
        return np.ascontiguousarray(axes_in_order(blocks, _IN_ORDER, axes))  # type: ignore[arg-type]


def _read_step(params: Params, cache: KVCache, blocks: Array, *, model: ParallelModel) -> KVCache:
    return jax.tree.map(lambda array: array[blocks], cache)


def _write_step(
    params: Params, cache: KVCache, blocks: Array, new: KVCache, *, model: ParallelModel
) -> KVCache:
    return jax.tree.map(lambda old, one: model.backend.set_blocks(old, blocks, one), cache, new)
