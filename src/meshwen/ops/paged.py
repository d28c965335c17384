# SPDX-License-Identifier: Apache-2.0
"""Tokens of a step whose keys and values are in KV blocks, and attention to these by XLA.

The KV cache of a layer is a pool of blocks, each of a few positions of one sequence. A sequence has
a table of its blocks: its position p is in block `table[p // S]`, at p % S. The N tokens of a step
are of R sequences, one behind the other: ragged, without padding between them.

XLA's attention cuts these tokens into tiles of one sequence each, and gathers the keys and values
of a tile's sequence. A kernel reads them where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32, Int32, Shaped

from meshwen.ops.attention import softmax_attention
from meshwen.ops.cache_layout import CacheLayout
from meshwen.ops.ordered import OrderedSums, pad
from meshwen.runtime.shape_buckets import power_of_two

_LONGEST_TILE = 32  # tokens
_GROUP_BYTES = 1 << 27  # what scores, keys and values of tiles may take that are computed at once


class PagedTokens(NamedTuple):
    """Where the tokens of a step are: N tokens of R sequences, W blocks in each one's table.

    Attributes:
        positions: in their sequences.
        query_starts: sequence r has the tokens from query_starts[r] to query_starts[r + 1] - 1,
            which follow one another. Tokens behind those of all sequences are padding.
        lengths: positions of each sequence that are in the cache, these tokens included.
        tables: the sequences' blocks; anything behind the last one in use.
        slots: block * S + place in the block of each token; -1 of padding.
    """

    positions: Int32[Array, " N"]
    query_starts: Int32[Array, " R1"]
    lengths: Int32[Array, " R"]
    tables: Int32[Array, "R W"]
    slots: Int32[Array, " N"]

    @classmethod
    def of(
        cls,
        positions: Int32[Array, " N"],
        query_starts: Int32[Array, " R1"],
        lengths: Int32[Array, " R"],
        tables: Int32[Array, "R W"],
        block_size: int,
    ) -> Self:
        """With the places that follow from tables and positions."""
        rows = _rows(query_starts, len(positions))
        padding = rows == len(lengths)
        blocks = tables[jnp.where(padding, 0, rows), positions // block_size]
        slots = jnp.where(padding, -1, blocks * block_size + positions % block_size)
        return cls(positions, query_starts, lengths, tables, slots)

    def at(self, index: Int32[Array, " B"]) -> PagedTokens:
        """Some tokens, each as a sequence of its own: what it attends to stays the same."""
        rows = _rows(self.query_starts, len(self.positions))[index]
        rows = jnp.minimum(rows, len(self.lengths) - 1)
        positions, count = self.positions[index], len(index)
        starts = jnp.arange(count + 1, dtype=jnp.int32)
        return PagedTokens(positions, starts, positions + 1, self.tables[rows], self.slots[index])


class PagedMask(NamedTuple):
    """To which keys tokens attend: each to the last `window` ones of its sequence up to its own."""

    tokens: PagedTokens
    window: Int32[Array, ""]

    def at(self, index: Int32[Array, " B"]) -> PagedMask:
        """Of some tokens."""
        return PagedMask(self.tokens.at(index), self.window)


def written(
    blocks: Shaped[Array, "_ _ _ _"],
    new: Shaped[Array, "N K H"],
    slots: Int32[Array, " N"],
    axes: str,
) -> Shaped[Array, "_ _ _ _"]:
    """Blocks with keys or values of tokens at their places.

    Args:
        blocks: of axes in this order: B blocks, K heads, S positions, H head_dim.
        new: of the same dtype.
        slots: as `PagedTokens.slots`.
        axes: "BSKH" or another order.
    """
    size = blocks.shape[axes.index("S")]
    # What is out of bounds is dropped; -1 would be the last.
    block = jnp.where(slots < 0, len(blocks), slots // size)
    place = {"B": block, "S": slots % size}
    index = tuple(place.get(axis, slice(None)) for axis in axes)
    return blocks.at[index].set(new, mode="drop")


def attention(
    q: Float32[Array, "N heads H"],
    keys: Shaped[Array, "_ _ _ _"],
    values: Shaped[Array, "_ _ _ _"],
    mask: PagedMask,
    mask_array: Callable[[Array, Any, int], Array | None],
    layout: CacheLayout,
    exp: Callable[[Array], Array],
    sums: OrderedSums | None,
) -> Float32[Array, "N heads H"]:
    """softmax(q keys^T) values, of tokens that attend to their sequences' blocks; 0 of padding.

    Args:
        q: divided by sqrt(H).
        keys, values: blocks, in the order of `layout`.
        mask: where the tokens are, and to which keys they attend.
        mask_array: `Backend.mask`.
        layout: of keys and values.
        exp, sums: see `softmax_attention`.
    """
    tokens, K = mask.tokens, keys.shape[layout.keys.index("K")]
    tiles, length = _Tiles.of(tokens), tokens.tables.shape[1] * keys.shape[layout.keys.index("S")]

    def attend(some: tuple[Array, ...]) -> Float32[Array, "C T heads H"]:
        """A few tiles."""
        index, rows, held = some
        array = mask_array(tokens.positions[index], mask.window, length)
        assert array is not None, "the mask is of a back end that reads none"
        tables = tokens.tables[rows]
        k = _gathered(keys, tables, held, layout.keys)
        v = _gathered(values, tables, held, layout.values)
        y = softmax_attention(q[index].swapaxes(1, 2), k, v, array, layout, exp, sums)
        return y.swapaxes(1, 2)

    T, (heads, H) = tiles.tokens.shape[1], q.shape[1:]
    at_once = max(1, _GROUP_BYTES // (8 * length * (heads * T + K * H)))
    y = _in_groups(attend, (tiles.tokens, tiles.rows, tiles.held), at_once)
    y = y[tiles.of_token, tiles.place]
    return jnp.where(tokens.slots[:, None, None] < 0, 0.0, y)


class _Tiles(NamedTuple):
    """The tokens of a step in C tiles of T, each of one sequence; some tiles may be empty."""

    tokens: Int32[Array, "C T"]  # beyond the sequence's last one, any
    rows: Int32[Array, " C"]
    held: Int32[Array, " C"]  # positions that the sequence has in the cache
    of_token: Int32[Array, " N"]  # the tile of a token
    place: Int32[Array, " N"]  # and its place there

    @classmethod
    def of(cls, tokens: PagedTokens) -> Self:
        N, R, starts = len(tokens.positions), len(tokens.lengths), tokens.query_starts
        T = min(power_of_two(-(-N // R)), _LONGEST_TILE)
        count = N if T == 1 else -(-N // T) + R
        begins = jnp.cumulative_sum(-(-jnp.diff(starts) // T), include_initial=True)
        begins = begins.astype(jnp.int32)
        tile = jnp.arange(count, dtype=jnp.int32)
        row = jnp.minimum(_rows(begins, count), R - 1)
        first = starts[row] + (tile - begins[row]) * T
        index = jnp.clip(first[:, None] + jnp.arange(T, dtype=jnp.int32), 0, N - 1)
        mine = jnp.minimum(_rows(starts, N), R - 1)
        place = jnp.arange(N, dtype=jnp.int32) - starts[mine]
        of_token = jnp.minimum(begins[mine] + place // T, count - 1)
        return cls(index, row, tokens.lengths[row], of_token, place % T)


def _rows(starts: Int32[Array, " R1"], count: int) -> Int32[Array, " {count}"]:
    """Of `count` things, one run behind the other, the run of each; R behind the last run."""
    number = jnp.arange(count, dtype=jnp.int32)
    return (starts[1:] <= number[:, None]).sum(axis=1, dtype=jnp.int32)


def _gathered(
    blocks: Shaped[Array, "_ _ _ _"],
    tables: Int32[Array, "C W"],
    held: Int32[Array, " C"],
    axes: str,
) -> Float[Array, "C _ _ _"]:
    """The blocks of tables as rows of W * S positions; zeros where a sequence holds nothing.

    What is masked has the weight 0, but 0 times NaN, which may be left in a block, is NaN.
    """
    place = axes.index("S")
    some = jnp.moveaxis(blocks[tables], 1, place)  # W right before S.
    if some.dtype == jnp.uint16:  # Of bfloat16, as a back end may hold it.
        some = lax.bitcast_convert_type(some, jnp.bfloat16)
    shape = some.shape
    rows = some.reshape(*shape[:place], -1, *shape[place + 2 :])
    seen = jnp.arange(rows.shape[place]) < held[:, None]
    others = [axis for axis in range(1, 4) if axis != place]
    return jnp.where(jnp.expand_dims(seen, others), rows, 0)


def _in_groups(
    function: Callable[[tuple[Array, ...]], Array], arrays: tuple[Array, ...], size: int
) -> Array:
    """`function(arrays)`, of arrays whose first axis is taken `size` at a time."""
    count = len(arrays[0])
    if count <= size:
        return function(arrays)
    groups = -(-count // size)
    split = tuple(
        pad(a, 0, groups * size - count).reshape(groups, size, *a.shape[1:]) for a in arrays
    )
    y = lax.map(function, split)
    return y.reshape(groups * size, *y.shape[2:])[:count]
