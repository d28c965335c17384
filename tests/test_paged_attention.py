# SPDX-License-Identifier: Apache-2.0
"""XLA's attention through block tables, held to float64; and what is written to KV blocks."""

from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwen.ops import paged
from meshwen.ops.backend import Backend
from meshwen.ops.cpu.xla import XlaOnCpu
from meshwen.ops.paged import PagedMask, PagedTokens

pytestmark = pytest.mark.usefixtures("unoptimised")

S, K, G, H = 8, 2, 3, 4  # positions of a block, key/value heads, query heads of each, head_dim
BLOCKS, WIDTH = 64, 16
EVERYWHERE = 1 << 30

# First position and tokens of each sequence; tokens of the step, padding included.
STEPS = {
    "newest tokens": ([(0, 1), (7, 1), (8, 1), (100, 1)], 4),
    "one token": ([(20, 1)], 1),
    "ragged": ([(3, 5), (17, 1), (0, 9)], 16),
    "several tiles": ([(11, 70), (0, 3)], 96),
    "sequences without tokens": ([(5, 0), (6, 3), (0, 0), (30, 2)], 8),
    "a prompt and newest tokens": ([(90, 1), (0, 40), (12, 1), (1, 1)], 48),
    "padding alone": ([(0, 0), (4, 0)], 4),
}
every_step = pytest.mark.parametrize(("sequences", "count"), STEPS.values(), ids=STEPS)
every_backend = pytest.mark.parametrize("backend", [Backend(), XlaOnCpu()], ids=["any", "cpu"])
every_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


class Step:
    """A step, the blocks before it, and what of each sequence will be in these.

    Nothing but the positions in use has numbers: the rest is NaN.
    """

    def __init__(self, backend, dtype, sequences, count):
        rng = np.random.default_rng(7)
        free = rng.permutation(np.arange(1, BLOCKS)).tolist()
        lengths = [start + n for start, n in sequences]
        tables = np.array([[free[-1]] * WIDTH for _ in sequences], np.int32)
        for row, length in enumerate(lengths):
            used = -(-length // S)
            tables[row, :used], free = free[:used], free[used:]
        drawn = [[rng.standard_normal((n, K, H)) for n in lengths] for _ in "kv"]
        self.keys, self.values = ([np.array(jnp.asarray(x, dtype)) for x in some] for some in drawn)
        starts = np.cumsum([0, *(n for _, n in sequences)])
        positions = np.zeros(count, np.int32)
        new = np.zeros((2, count, K, H), dtype)
        for row, (start, n) in enumerate(sequences):
            positions[starts[row] : starts[row + 1]] = range(start, start + n)
            for i, held in enumerate((self.keys, self.values)):
                new[i, starts[row] : starts[row + 1]] = held[row][start:]
        self.sequences, self.starts, self.backend = sequences, starts, backend
        self.where = tuple(jnp.asarray(x, jnp.int32) for x in (positions, starts, lengths, tables))
        self.new = tuple(map(jnp.asarray, new))
        self.q = jnp.asarray(rng.standard_normal((count, K * G, H)), jnp.float32)
        self.blocks = self._blocks(tables, dtype)

    def _blocks(self, tables, dtype):
        """With what came before the step."""
        rows = np.full((2, BLOCKS, S, K, H), np.nan, dtype)
        for row, (start, _) in enumerate(self.sequences):
            for i, held in enumerate((self.keys, self.values)):
                for p in range(start):
                    rows[i, tables[row, p // S], p % S] = held[row][p]
        held = self.backend.empty_blocks((1,), dtype).dtype  # Perhaps integers of the same bits.
        layout = self.backend.cache_layout
        return tuple(
            jnp.asarray(np.einsum(f"BSKH->{axes}", some.view(held)))
            for some, axes in zip(rows, (layout.keys, layout.values), strict=True)
        )

    @cached_property
    def attention(self):
        """By the back end, of a window, the tokens' own keys and values written before."""
        return partial(self._attention(ordered=False), self.q, self.blocks, self.new, self.where)

    @cached_property
    def ordered_attention(self):
        """The same with sums of one order."""
        return partial(self._attention(ordered=True), self.q, self.blocks, self.new, self.where)

    def _attention(self, ordered):
        @jax.jit
        def computed(q, blocks, new, where, window):
            tokens = PagedTokens.of(*where, S)
            blocks = self.backend.write_blocks(blocks, new, tokens.slots)
            mask = PagedMask(tokens, jnp.int32(window))
            return self.backend.attend_blocks(q, *blocks, mask, jnp.exp, ordered=ordered)

        return computed

    def expected(self, window) -> np.ndarray:
        """In float64, from the sequences' keys and values."""
        y = np.zeros(self.q.shape)
        for row, (start, n) in enumerate(self.sequences):
            for i in range(n):
                place, seen = (
                    self.starts[row] + i,
                    slice(max(0, start + i + 1 - window), start + i + 1),
                )
                for head in range(K * G):
                    keys, values = (
                        np.asarray(x[row][seen, head // G], np.float64)
                        for x in (self.keys, self.values)
                    )
                    scores = keys @ np.asarray(self.q[place, head], np.float64)
                    weights = np.exp(scores - scores.max())
                    y[place, head] = weights @ values / weights.sum()
        return y

    def tolerance(self, dtype) -> float:
        """Of float32, the usual; weights are rounded to the dtype of values."""
        largest = max((np.abs(x).max() for x in self.values if x.size), default=0)
        return 2e-6 if dtype == jnp.float32 else 2.0**-8 * float(largest)


@every_backend
@every_dtype
@every_step
def test_tokens_attend_to_their_own_sequences_up_to_themselves(sequences, count, dtype, backend):
    step = Step(backend, dtype, sequences, count)
    for window in (EVERYWHERE, 1, 6, 20):
        found = step.attention(window)
        np.testing.assert_allclose(found, step.expected(window), rtol=0, atol=step.tolerance(dtype))
        assert not np.asarray(found)[step.starts[-1] :].any()


@every_backend
@pytest.mark.parametrize("tiles", [1, 2, 3])
def test_tiles_in_groups_give_the_same(tiles, backend, monkeypatch):
    a_tile = 8 * WIDTH * S * (K * G * 32 + K * H)  # bytes
    monkeypatch.setattr(paged, "_GROUP_BYTES", tiles * a_tile)
    step = Step(backend, jnp.float32, *STEPS["several tiles"])
    found = step.attention(EVERYWHERE)
    np.testing.assert_allclose(found, step.expected(EVERYWHERE), rtol=0, atol=2e-6)


def test_more_tiles_than_memory_is_meant_for_are_computed_one_group_after_another(monkeypatch):
    def loops() -> int:
        step = Step(Backend(), jnp.float32, *STEPS["ragged"])
        return str(jax.make_jaxpr(step.attention)(9)).count("scan[")

    assert loops() == 0
    monkeypatch.setattr(paged, "_GROUP_BYTES", 1)
    assert loops() == 1


@every_backend
def test_some_tokens_attend_to_what_they_do_among_others(backend):
    step = Step(backend, jnp.float32, *STEPS["ragged"])
    index = jnp.array([14, 0, 5, 15])  # The last is padding.

    @jax.jit
    def some(q, blocks, new, where, window):
        tokens = PagedTokens.of(*where, S)
        blocks = backend.write_blocks(blocks, new, tokens.slots)
        return backend.attend_blocks(q, *blocks, PagedMask(tokens, window).at(index), jnp.exp)

    for window in (EVERYWHERE, 3):
        found = some(step.q[index], step.blocks, step.new, step.where, jnp.int32(window))
        np.testing.assert_allclose(found, step.expected(window)[index], rtol=0, atol=2e-6)


@pytest.mark.usefixtures("optimised")
@every_backend
def test_ordered_attention_has_the_same_bits_whatever_is_computed_beside(backend):
    step = Step(backend, jnp.float32, *STEPS["ragged"])
    found = np.asarray(step.ordered_attention(6))
    np.testing.assert_allclose(found, step.expected(6), rtol=0, atol=2e-6)

    @jax.jit
    def alone(q, blocks, new, where, index):
        tokens = PagedTokens.of(*where, S)
        blocks = backend.write_blocks(blocks, new, tokens.slots)
        mask = PagedMask(tokens, jnp.int32(6)).at(index)
        return backend.attend_blocks(q[index], *blocks, mask, jnp.exp, ordered=True)

    for place in range(step.starts[-1]):
        one = alone(step.q, step.blocks, step.new, step.where, jnp.array([place]))
        np.testing.assert_array_equal(one, found[[place]])


def test_places_follow_from_tables_and_padding_has_none():
    tables = jnp.array([[5, 2, 9], [4, 9, 9], [7, 1, 9]])
    found = PagedTokens.of(
        jnp.array([7, 8, 9, 0, 1, 0]),
        jnp.array([0, 3, 3, 5]),
        jnp.array([10, 0, 2]),
        tables,
        block_size=4,
    )
    assert found.slots.tolist() == [2 * 4 + 3, 9 * 4, 9 * 4 + 1, 7 * 4, 7 * 4 + 1, -1]


@every_dtype
@pytest.mark.parametrize("axes", ["BSKH", "BKSH", "BKHS"])
def test_tokens_are_written_at_their_places_and_padding_nowhere(axes, dtype):
    rng = np.random.default_rng(0)
    before = np.array(jnp.asarray(rng.standard_normal((3, 4, 2, 5)), dtype))  # BSKH
    new = np.array(jnp.asarray(rng.standard_normal((4, 2, 5)), dtype))
    found = paged.written(
        jnp.asarray(np.einsum(f"BSKH->{axes}", before)),
        jnp.asarray(new),
        jnp.array([11, -1, 4, -1]),
        axes,
    )
    before[2, 3], before[1, 0] = new[0], new[2]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.einsum(f"BSKH->{axes}", before))
