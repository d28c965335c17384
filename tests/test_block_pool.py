# SPDX-License-Identifier: Apache-2.0
"""KV blocks of one part: references, the order in which they are given out, and the index."""

import pytest

from meshwen.cache.block_pool import NULL_BLOCK, BlockPool


def test_every_block_but_the_null_block_is_given_out_once():
    pool = BlockPool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert (pool.free_blocks, pool.used_blocks) == (0, 4)
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []


def test_where_too_few_are_free_nothing_is_taken():
    pool = BlockPool(4)
    assert pool.allocate(4) is None
    assert pool.free_blocks == 3
    pool.check({})


def test_a_block_is_free_after_its_last_reference():
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.acquire(block)
    assert pool.references(block) == 2
    pool.release([block])
    pool.check({block: 1})
    assert pool.free_blocks == 1
    pool.release([block])
    pool.check({})
    assert pool.free_blocks == 2


def test_a_named_block_is_found_until_it_is_evicted():
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.name(block, b"a")
    assert pool.find(b"a") == block
    pool.release([block])
    assert (pool.find(b"a"), pool.free_blocks) == (block, 2)
    (other,) = pool.allocate(1)  # The one that was never used goes first.
    assert (other != block, pool.find(b"a"), pool.evictions) == (True, block, 0)
    assert pool.allocate(1) == [block]
    assert (pool.find(b"a"), pool.digest(block), pool.evictions) == (None, None, 1)
    pool.check({1: 1, 2: 1})


def test_a_found_block_that_is_acquired_cannot_be_evicted():
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.name(block, b"a")
    pool.release([block])
    pool.acquire(pool.find(b"a"))
    assert pool.allocate(2) is None
    assert pool.allocate(1) != [block]


def named(pool, *digests):
    """Blocks with these digests, in use."""
    blocks = pool.allocate(len(digests))
    for block, digest in zip(blocks, digests, strict=True):
        pool.name(block, digest)
    return blocks


def test_the_least_recently_used_is_evicted_first_and_of_a_sequence_its_last_block():
    pool = BlockPool(7)
    first, second, third = (named(pool, f"{n}0".encode(), f"{n}1".encode()) for n in "abc")
    for blocks in (second, first, third):
        pool.release(blocks)
    for block in second:  # Used again: now it is the last that was.
        pool.acquire(block)
    pool.release(second)
    order = [pool.allocate(1)[0] for _ in range(6)]
    assert order == [*reversed(first), *reversed(third), *reversed(second)]


def test_of_two_blocks_with_one_digest_the_first_is_found_and_the_other_free_at_once():
    pool = BlockPool(4)
    (first,) = named(pool, b"a")
    (second,) = named(pool, b"a")
    assert (pool.find(b"a"), pool.digest(second)) == (first, None)
    pool.release([first])
    pool.release([second])
    pool.check({})
    assert pool.find(b"a") == first
    pool.name(pool.allocate(1)[0], b"b")
    assert pool.find(b"a") == first


def test_clear_forgets_everything():
    pool = BlockPool(4)
    pool.release(named(pool, b"a"))
    named(pool, b"b")
    pool.clear()
    assert (pool.find(b"a"), pool.find(b"b"), pool.free_blocks) == (None, None, 3)
    pool.check({})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda pool: pool.acquire(1), "block 1 counts 2 references, not 1"),
        (lambda pool: pool._free.append(1), "not one state for each block"),
        (lambda pool: pool._free.pop(), "not one state for each block"),
        (lambda pool: pool._named.clear(), "the index is another"),
        (lambda pool: pool._digests.__setitem__(pool._free[0], b"a"), "the index is another"),
        (lambda pool: pool._free.append(pool._evictable.popitem()[0]), "free block .* has a dig"),
        (lambda pool: pool._evictable.update({pool._free.pop(): None}), "evictable .* has no dig"),
    ],
)
def test_the_check_finds_what_is_wrong(damage, said):
    pool = BlockPool(6)
    (used,) = pool.allocate(1)
    pool.release(named(pool, b"a"))
    pool.check({used: 1})
    damage(pool)
    with pytest.raises(AssertionError, match=said):
        pool.check({used: 1})


def test_the_null_block_is_nobodys():
    assert NULL_BLOCK == 0
    with pytest.raises(AssertionError, match="block 0 counts 0 references, not 1"):
        BlockPool(2).check({NULL_BLOCK: 1})
