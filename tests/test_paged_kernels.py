# SPDX-License-Identifier: Apache-2.0
"""The kernels of a paged KV cache: the same bits wherever blocks are, writes in place."""

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import one_block
from emulated import every_instruction_set
from meshwen.ops.cpu import kernels
from needs_kernels import needs_kernels

pytestmark = needs_kernels

every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
REFUSED = (ValueError, jax.errors.JaxRuntimeError)
EVERYWHERE = 1 << 20  # A window of all positions.


@pytest.fixture(params=every_instruction_set(int8=False))
def instructions(request, monkeypatch):
    """Makes each set of instructions the one to be used, emulated where the CPU lacks it."""
    request.param.use(monkeypatch)
    return request.param


def bits(array) -> np.ndarray:
    return np.asarray(array).view(np.int32)


@dataclass(frozen=True)
class Case:
    """Sequences: K heads of G queries and `h` dimensions, S positions a block.

    `lengths` are of each sequence, with its `tokens`; pools have `padded` dimensions.
    """

    K: int
    G: int
    h: int
    S: int
    lengths: tuple[int, ...]
    tokens: tuple[int, ...]
    window: int = EVERYWHERE

    @property
    def padded(self) -> int:
        return -(-self.h // 32) * 32

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum([0, *self.tokens], dtype=np.int32)


CASES = [
    # Decode steps: one block, several, several passes; windows; blocks that are no part of a pass.
    Case(2, 7, 64, 32, (1, 32, 33, 700), (1, 1, 1, 1)),
    Case(1, 14, 32, 96, (1056, 512, 513), (1, 1, 1), window=100),
    Case(4, 2, 128, 32, (600,), (1,), window=5),
    # Prompts and their later chunks, drafts, sequences without tokens, all of them mixed.
    Case(2, 3, 32, 32, (70, 9, 1100, 0, 40), (70, 3, 40, 0, 1)),
    Case(1, 1, 64, 64, (530, 13), (30, 13), window=30),
    Case(1, 14, 32, 32, (576, 20), (70, 0), window=600),
    # Dimensions, or blocks, that are no power of two.
    Case(2, 2, 40, 96, (200, 100), (9, 1)),
    Case(1, 3, 8, 32, (48,), (20,), window=7),
]


@dataclass(frozen=True)
class Data:
    """Arguments of `paged_attention`, and what rows of the cache would hold.

    Pools are NaN but for what some token sees.
    """

    arguments: list
    keys: np.ndarray  # [R, K, h, S]
    values: np.ndarray  # [R, K, S, h]


def data(case: Case, dtype: str, seed: int = 0) -> Data:
    rng = np.random.default_rng(seed)
    R, S, number = len(case.lengths), case.S, partial(rng.standard_normal, dtype=np.float32)
    longest = -(-max(case.lengths) // 32) * 32
    keys, values = number((R, case.K, case.h, longest)), number((R, case.K, longest, case.h))
    W = -(-longest // S) + 1
    blocks = rng.permutation(R * W).reshape(R, W)
    pool = np.full((R * W, case.K, case.padded, S), np.nan, np.float32)
    value_pool = pool.swapaxes(2, 3).copy()
    tables = np.full((R, W), -5, np.int32)
    for r, (length, tokens) in enumerate(zip(case.lengths, case.tokens, strict=True)):
        first = max(0, length - tokens + 1 - case.window)
        for p in range(first, length if tokens else 0):
            block = tables[r, p // S] = blocks[r, p // S]
            pool[block, :, : case.h, p % S] = keys[r, :, :, p]
            value_pool[block, :, p % S, : case.h] = values[r, :, p]
    N = sum(case.tokens) + 2
    q = number((N, case.K * case.G, case.h)) * case.h**-0.5
    lengths = np.array(case.lengths, np.int32)
    pools = [x.astype(jnp.dtype(dtype)) for x in (pool, value_pool)]
    arguments = [q, *pools, case.starts, lengths, tables, np.int32(case.window)]
    return Data(arguments, keys.astype(jnp.dtype(dtype)), values.astype(jnp.dtype(dtype)))


def rows_of(case: Case, of: Data) -> list[list]:
    """Arguments of `one_block.attention` that give the same, of each sequence."""
    return [
        [
            of.arguments[0][case.starts[r] : case.starts[r + 1]].swapaxes(0, 1)[None],
            *(of.keys, of.values, np.array([r]), np.array([case.lengths[r] - tokens])),
            case.window,
        ]
        for r, tokens in enumerate(case.tokens)
    ]


def in_float64(case: Case, of: Data, r: int) -> np.ndarray:
    """The tokens of a sequence: [tokens, N, h]."""
    q = of.arguments[0][case.starts[r] : case.starts[r + 1]].astype(np.float64)
    last = case.lengths[r] - len(q) + np.arange(len(q))[:, None]
    places = np.arange(of.keys.shape[3])
    seen = (places <= last) & (places > last - case.window)
    q = q.reshape(len(q), case.K, case.G, case.h)
    scores = np.einsum("tkgh,khs->tkgs", q, of.keys[r].astype(np.float64))
    scores = np.where(seen[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    y = np.einsum("tkgs,ksh->tkgh", weights, of.values[r].astype(np.float64))
    return y.reshape(len(q), case.K * case.G, case.h)


@cache
def in_one_block(dtype: str) -> list[tuple[Case, Data, list[np.ndarray]]]:
    """Each case, its data and what each sequence has alone: the bits of all processors."""
    cases = [(case, data(case, dtype)) for case in CASES]

    def attend(one: list) -> jax.Array:
        return one_block.attention(*one)[0].swapaxes(0, 1)

    found = jax.jit(lambda rows: [[attend(one) for one in case] for case in rows])(
        [rows_of(case, of) for case, of in cases]
    )
    for (case, of), rows in zip(cases, found, strict=True):
        for r, row in enumerate(rows):
            exact = in_float64(case, of, r)
            np.testing.assert_allclose(row, exact, rtol=0, atol=2e-6, err_msg=str(case))
    return [(*case, list(map(bits, rows))) for case, rows in zip(cases, found, strict=True)]


@every_dtype
def test_a_token_has_the_bits_that_it_has_in_one_block_which_are_near_float64(dtype, instructions):
    cases = in_one_block(dtype)
    attend = jax.jit(lambda arguments: [kernels.paged_attention(*one) for one in arguments])
    found = attend([of.arguments for _, of, _ in cases])
    for (case, _, rows), one in zip(cases, found, strict=True):
        expected = np.concatenate(rows)
        np.testing.assert_array_equal(bits(one)[: len(expected)], expected, err_msg=str(case))
        np.testing.assert_array_equal(one[len(expected) :], 0)


@every_dtype
def test_a_token_has_the_same_bits_whatever_is_attended_to_beside_it(dtype):
    case = Case(2, 3, 64, 32, (1200, 80), (150, 80), window=700)
    q, *pools, starts, lengths, tables, window = data(case, dtype).arguments
    whole = kernels.paged_attention(q, *pools, starts, lengths, tables, window)
    for begin, end in ((0, 1), (1, 5), (5, 70), (70, 150)):
        where = np.array([0, end - begin]), lengths[:1] - 150 + end, tables[:1]
        part = kernels.paged_attention(q[begin:end], *pools, *where, window, alone=begin == 5)
        np.testing.assert_array_equal(bits(part), bits(whole)[begin:end])


def test_tokens_of_no_sequence_are_zeros():
    q, keys, values = jnp.ones((5, 2, 32)), jnp.ones((2, 1, 32, 32)), jnp.ones((2, 1, 32, 32))
    tables = jnp.zeros((2, 1), int)
    found = kernels.paged_attention(
        q, keys, values, *map(jnp.array, ([2, 2, 4], [0, 9])), tables, 9
    )
    np.testing.assert_array_equal(found[:, 0, 0], [0, 0, 1, 1, 0])
    none = kernels.paged_attention(q, keys, values, jnp.array([0]), tables[:0, 0], tables[:0], 9)
    np.testing.assert_array_equal(none, np.zeros((5, 2, 32)))
    assert (
        kernels.paged_attention(q[:0], keys, values, tables[0], *(tables[:0, 0],) * 2, 9).size == 0
    )


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"query_starts": [0, 1, 0]}, "sequence 1 begins behind its end"),
        ({"query_starts": [-1, 1, 2]}, "sequences have the tokens -1 to 2, of 3"),
        ({"query_starts": [0, 1, 4]}, "sequences have the tokens 0 to 4, of 3"),
        ({"lengths": [0, 40]}, "1 tokens of a sequence of 0 positions in 2 blocks"),
        ({"lengths": [1, 65]}, "2 tokens of a sequence of 65 positions in 2 blocks"),
        ({"lengths": [-1, 40]}, "1 tokens of a sequence of -1 positions in 2 blocks"),
        ({"tables": [[3, 0], [0, 0]]}, "block 3 is not in the pool of 3"),
        ({"tables": [[0, 0], [0, -1]]}, "block -1 is not in the pool of 3"),
        ({"window": 0}, "the window is empty"),
    ],
)
def test_what_would_be_outside_of_the_pool_is_refused(wrong, reason):
    arguments = {
        "q": jnp.ones((3, 2, 32)),
        **dict.fromkeys(("keys", "values"), jnp.ones((3, 1, 32, 32))),
        **{"query_starts": [0, 1, 3], "lengths": [1, 40], "tables": [[2, 9], [0, 1]], "window": 40},
    }

    def attend(**others) -> jax.Array:
        return kernels.paged_attention(**{k: jnp.asarray(v) for k, v in others.items()})

    np.testing.assert_array_equal(attend(**arguments), 1)
    with pytest.raises(REFUSED, match=reason):
        attend(**arguments | wrong).block_until_ready()


def test_what_attention_over_blocks_is_not_for_is_refused():
    q, keys = jnp.ones((3, 2, 32)), jnp.ones((1, 1, 32, 32))
    where = jnp.array([0, 1]), jnp.array([1]), jnp.array([[0]]), 5
    with pytest.raises(TypeError, match="no attention for float32, float16, float16"):
        kernels.paged_attention(q, *(keys.astype(jnp.float16),) * 2, *where)
    with pytest.raises(REFUSED, match="33 dimensions are not in 32"):
        kernels.paged_attention(jnp.ones((3, 2, 33)), keys, keys, *where).block_until_ready()


def new_tokens(N: int, K: int, h: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(N)
    return tuple(rng.standard_normal((N, K, h)).astype(jnp.dtype(dtype)) for _ in range(2))


def write_in_numpy(keys, values, new_keys, new_values, slots):
    """One token after the other, with zeros behind its dimensions."""
    keys, values, S, h = np.array(keys), np.array(values), keys.shape[3], new_keys.shape[2]
    for key, value, slot in zip(new_keys, new_values, slots, strict=True):
        if slot >= 0:
            keys[slot // S, :, :h, slot % S], keys[slot // S, :, h:, slot % S] = key, 0
            values[slot // S, :, slot % S, :h], values[slot // S, :, slot % S, h:] = value, 0
    return keys, values


@every_dtype
@pytest.mark.parametrize(
    ("S", "h", "slots"),
    [
        (32, 64, [0, 95, 32, -1, 64]),
        (32, 40, [*range(70), 5, -1, 5]),  # Twice the same.
        (64, 8, [130, 63, 64]),
        (32, 128, [*range(95, -1, -1)] * 2),  # So many that threads share them.
        (32, 64, []),
    ],
)
def test_tokens_are_written_where_their_slots_are(dtype, S, h, slots):
    H = -(-h // 32) * 32
    pool = np.random.default_rng(1).standard_normal((3, 2, H, S)).astype(jnp.dtype(dtype))
    arrays = pool, pool.swapaxes(2, 3).copy(), *new_tokens(len(slots), 2, h, dtype)
    expected = write_in_numpy(*arrays, slots)
    found = kernels.write_cache(*map(jnp.asarray, arrays), jnp.array(slots, jnp.int32))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(one), other)


@pytest.mark.parametrize("slot", [96, -2, 2**31 - 1, -(2**31)])
def test_slots_outside_of_the_pool_are_refused(slot):
    pool, new = jnp.ones((3, 1, 32, 32)), jnp.ones((2, 1, 32))
    with pytest.raises(REFUSED, match=f"slot {slot} is not in the pool of 3"):
        kernels.write_cache(pool, pool, new, new, jnp.array([0, slot]))[0].block_until_ready()


def test_other_dtypes_are_not_written():
    pool, new = jnp.ones((3, 1, 32, 32)), jnp.ones((2, 1, 32), jnp.bfloat16)
    with pytest.raises(TypeError, match="bfloat16 cannot be written to a cache of float32"):
        kernels.write_cache(pool, pool, new, new, jnp.array([0, 1]))


LAYERS = 3
SHARDED = PartitionSpec("data")


def layers(cache, x, slots, lengths, tables):
    """What a model does: writes to the pool of each layer, and reads it."""
    written, starts = [], jnp.arange(len(x) + 1)
    for keys, values in cache:
        new = x[:, :1].astype(keys.dtype)
        keys, values = kernels.write_cache(keys, values, new, new, slots)
        x = x + kernels.paged_attention(x, keys, values, starts, lengths, tables, EVERYWHERE)
        written.append((keys, values))
    return written, x


def devices(count: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:count]), ("data",))


def unwritten_layers(blocks: int) -> list[tuple[jax.Array, jax.Array]]:
    shape = blocks, 1, 32, 32
    return [tuple(kernels.unwritten(shape, jnp.bfloat16) for _ in range(2)) for _ in range(LAYERS)]


def on(mesh: Mesh, function, in_specs, **options):
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=SHARDED, check_vma=False
    )
    return jax.jit(mapped, **options)


def pointers(cache) -> list[int]:
    shards = [shard for x in jax.tree.leaves(cache) for shard in x.addressable_shards]
    return [shard.data.unsafe_buffer_pointer() for shard in shards]


@pytest.mark.parametrize("count", [1, 8])
def test_a_donated_pool_is_written_in_place(count):
    mesh = devices(count)
    cache = on(mesh, partial(unwritten_layers, 40), ())()
    before = pointers(cache)
    assert len(set(before)) == 2 * LAYERS * count  # Not one array for calls that are alike.
    step = on(mesh, layers, (SHARDED,) * 5, donate_argnums=0)
    x = jnp.ones((count, 2, 32))
    for position in range(3):
        slots = jnp.full(count, 64 + position)
        where = slots, jnp.full(count, position + 1), jnp.full((count, 1), 2)
        if position == 0:
            assert (
                "bf16[40,1,32,32]{3,2,1,0} copy"
                not in step.lower(cache, x, *where).compile().as_text()
            )
        cache, y = step(cache, x, *where)
        # Each position holds what x was at its layer.
        np.testing.assert_array_equal(y[:, 0, 0], 2.0**LAYERS)
        assert pointers(cache) == before


@pytest.mark.parametrize("donated", [(), (0, 1)])
def test_who_reads_the_pool_as_it_was_finds_it_so(donated):
    def write_and_read(keys, values, new, slots):
        written = kernels.write_cache(keys, values, new, new, slots)
        return *written, keys.sum(), values + 1

    pool, new = jnp.zeros((2, 1, 32, 32)), jnp.ones((1, 1, 32))
    before = pool + 0
    step = jax.jit(write_and_read, donate_argnums=donated)
    keys, values, keys_sum, more = step(pool, before, new, jnp.array([3]))
    assert (keys.sum(), values.sum(), keys_sum, more.sum()) == (32, 32, 0, 2048)
    if not donated:
        assert not pool.any()


def resident_megabytes() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells no resident memory")
@pytest.mark.parametrize("count", [1, 8])
def test_memory_that_is_not_written_is_not_resident(count):
    mesh, megabyte = devices(count), 2**20 // (32 * 32 * 2 * 2 * LAYERS)
    step = on(mesh, layers, (SHARDED,) * 5, donate_argnums=0)
    x, where = jnp.ones((count, 2, 32)), jnp.ones((count, 1), int)
    small = on(mesh, partial(unwritten_layers, 4), ())()
    step(small, x, where[:, 0], where[:, 0], where * 0)  # What compiling takes, is taken.
    before = resident_megabytes()
    cache = on(mesh, partial(unwritten_layers, 1024 // count * megabyte), ())()
    for position in range(3):
        cache, _ = step(cache, x, where[:, 0] * position, where[:, 0] + position, where * 0)
    jax.block_until_ready(cache)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) > 1000 * 2**20
    assert resident_megabytes() - before < 200
