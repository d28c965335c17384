# SPDX-License-Identifier: Apache-2.0
"""Block tables of sequences: what they share, what they find again, and what is refused."""

import pytest

from meshwen.cache.block_manager import BlockManager, Placement, PrefixCacheStats

SIZE = 4
PROMPT = list(range(100, 111))  # Two full blocks, and three tokens of a third.


def manager(parts=1, num_blocks=10, prefix_caching=True) -> BlockManager:
    return BlockManager(parts, num_blocks, SIZE, prefix_caching)


def ran(blocks: BlockManager, sequence: int, tokens, salt=b"", **options) -> Placement:
    """A sequence that has begun and whose tokens are all computed."""
    placement = blocks.begin(sequence, tokens, salt, **options)
    assert placement is not None
    blocks.computed(sequence, tokens, len(tokens))
    blocks.check()
    return placement


def found(blocks: BlockManager, tokens, salt=b"") -> int:
    """How many tokens `begin` would find."""
    return len(blocks.find(tokens[:-1], salt)[1]) * SIZE


def test_a_sequence_has_a_block_for_every_started_block_of_tokens():
    blocks = manager()
    assert blocks.begin(0, PROMPT, b"") == Placement(0, 0)
    assert len(blocks.table(0)) == blocks.used_blocks == 3
    assert blocks.free_blocks(0) == 6
    blocks.check()
    blocks.free(0)
    assert (blocks.used_blocks, blocks.free_blocks(0)) == (0, 9)


def test_a_table_grows_in_place_only_where_it_must():
    blocks = manager()
    blocks.begin(0, PROMPT, b"")
    table = blocks.table(0)
    assert blocks.extend(0, 12)
    assert len(table) == 3
    assert blocks.extend(0, 13)
    assert len(table) == 4
    assert blocks.extend(0, 1)  # Never shorter.
    assert table is blocks.table(0)
    assert len(table) == 4


def test_a_table_grows_only_where_enough_blocks_stay_free():
    blocks = manager(num_blocks=5)
    blocks.begin(0, PROMPT[:4], b"")
    assert not blocks.extend(0, 9, reserve=2)
    assert blocks.extend(0, 8, reserve=2)
    assert blocks.extend(0, 8, reserve=9)  # It takes none.
    assert len(blocks.table(0)) == 2
    blocks.check()


def test_where_no_block_is_free_nothing_changes():
    blocks = manager(num_blocks=4)
    blocks.begin(0, PROMPT[:6], b"")
    assert not blocks.extend(0, 13)
    assert blocks.begin(1, PROMPT[:5], b"") is None
    assert (len(blocks.table(0)), blocks.free_blocks(0)) == (2, 1)
    assert blocks.begin(1, PROMPT[:4], b"", parts={0: 1}) is None
    assert blocks.begin(1, PROMPT[:4], b"") == (0, 0)
    blocks.check()


def test_a_prompt_that_was_read_is_found_in_full_blocks():
    blocks = manager()
    ran(blocks, 0, PROMPT)
    assert ran(blocks, 1, [*PROMPT[:9], 0, 0, 0]) == (0, 8)
    assert blocks.table(1)[:2] == blocks.table(0)[:2]
    assert blocks.table(1)[2] != blocks.table(0)[2]
    assert ran(blocks, 2, [*PROMPT[:7], 0, 0]) == (0, 4)
    blocks.free(0)
    blocks.check()
    assert ran(blocks, 3, PROMPT) == (0, 8)


def test_a_token_is_left_to_compute_of_a_prompt_that_is_all_cached():
    blocks = manager()
    ran(blocks, 0, PROMPT[:8])
    assert found(blocks, PROMPT[:8]) == 4
    assert found(blocks, PROMPT[:9]) == 8
    assert ran(blocks, 1, PROMPT[:8]) == (0, 4)


def test_blocks_are_found_once_they_are_computed_and_not_before():
    blocks = manager()
    blocks.begin(0, PROMPT, b"")
    assert found(blocks, PROMPT) == 0
    blocks.computed(0, PROMPT, 7)
    assert found(blocks, PROMPT) == 4
    blocks.computed(0, PROMPT, 8)
    assert found(blocks, PROMPT) == 8
    blocks.check()


def test_an_answer_is_found_too():
    blocks = manager()
    ran(blocks, 0, PROMPT)
    tokens = [*PROMPT, 1, 2]
    assert blocks.extend(0, len(tokens))
    blocks.computed(0, tokens, len(tokens))
    blocks.free(0)
    assert ran(blocks, 0, tokens) == (0, 12)


def test_other_tokens_before_or_another_salt_make_another_block():
    blocks = manager(num_blocks=20)
    ran(blocks, 0, [1, 2, 3, 4, 5, 6, 7, 8])
    assert found(blocks, [5, 6, 7, 8, 9]) == 0
    assert found(blocks, [0, 2, 3, 4, 5, 6, 7, 8, 9]) == 0
    assert found(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9], b"x") == 0
    assert ran(blocks, 1, [1, 2, 3, 4, 5, 6, 7, 8, 9], salt=b"x") == (0, 0)
    assert found(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9], b"x") == 8


def test_whose_prefix_is_not_to_be_used_leaves_its_own_unnamed():
    blocks = manager()
    ran(blocks, 0, PROMPT)
    assert ran(blocks, 1, PROMPT, use_cached=False) == (0, 0)
    assert not set(blocks.table(0)) & set(blocks.table(1))
    assert ran(blocks, 2, PROMPT) == (0, 8)
    assert blocks.table(2)[:2] == blocks.table(0)[:2]


def test_without_prefix_caching_nothing_is_found():
    blocks = manager(prefix_caching=False)
    ran(blocks, 0, PROMPT)
    assert found(blocks, PROMPT) == 0
    assert ran(blocks, 1, PROMPT) == (0, 0)
    assert len(blocks.fork(0, 2, 11)) == 1
    for sequence in range(3):
        blocks.check()
        blocks.free(sequence)
    assert blocks.used_blocks == 0
    assert blocks.stats == PrefixCacheStats(0, 0, 0)


def test_cached_blocks_count_as_free_until_they_are_taken():
    blocks = manager(num_blocks=5)
    ran(blocks, 0, PROMPT[:8])
    blocks.free(0)
    assert blocks.free_blocks(0) == 4
    # Two of the four are the prefix, so only two are left for the rest.
    assert blocks.begin(0, [*PROMPT[:8], *range(9)], b"") is None
    assert blocks.begin(0, [*PROMPT[:8], *range(8)], b"", parts={0: 1}) is None
    assert blocks.begin(0, [*PROMPT[:8], *range(8)], b"") == (0, 8)
    assert blocks.free_blocks(0) == 0
    blocks.check()


def test_the_beginning_of_a_prefix_is_evicted_last():
    blocks = manager(num_blocks=6)
    ran(blocks, 0, PROMPT[:8])
    blocks.free(0)
    assert blocks.begin(1, [0] * 16, b"") == (0, 0)
    assert blocks.stats.evictions == 1
    assert found(blocks, PROMPT) == 4


def test_a_cached_block_makes_up_for_one_sequence_more_in_a_part():
    blocks = manager(parts=3)
    assert [blocks.begin(n, [n] * 8, b"").part for n in range(3)] == [0, 1, 2]
    assert blocks.begin(3, [3] * 8, b"", parts={1: 0, 2: 0}).part == 1
    assert blocks.begin(4, [4] * 9, b"").part == 0
    ran(blocks, 5, PROMPT, parts={1: 0})
    # 2, 3 and 1 sequences: two blocks make up for two, and of equals free blocks decide.
    assert ran(blocks, 6, PROMPT) == (2, 0)
    assert [ran(blocks, n, PROMPT) for n in (7, 8, 9)] == [(2, 8), (2, 8), (1, 8)]
    assert blocks.begin(10, PROMPT, b"", parts={}) is None
    # Where one with the prefix has no room, another has.
    assert blocks.extend(1, 4 * (2 + blocks.free_blocks(1)))
    assert ran(blocks, 11, PROMPT, parts={1: 0, 2: 0}) == (2, 8)


def test_each_part_keeps_as_many_blocks_free_as_it_must():
    blocks = manager(parts=2, num_blocks=4)
    assert blocks.begin(0, [0] * 8, b"", parts={0: 2, 1: 2}) is None
    assert blocks.begin(0, [0] * 8, b"", parts={0: 2, 1: 1}) == (1, 0)
    assert blocks.begin(1, [1] * 8, b"", parts={0: 1, 1: 0}) == (0, 0)
    blocks.check()


def test_of_parts_with_equally_many_sequences_that_with_most_free_blocks_has_the_next():
    blocks = manager(parts=2)
    blocks.begin(0, [0] * 8, b"", parts={0: 0})
    blocks.begin(1, [1] * 4, b"", parts={1: 0})
    assert blocks.begin(2, [2] * 4, b"").part == 1
    assert blocks.begin(3, [3] * 4, b"").part == 0


def test_a_fork_shares_full_blocks_and_copies_the_rest():
    blocks = manager()
    ran(blocks, 0, PROMPT)
    copied = blocks.fork(0, 1, len(PROMPT))
    assert blocks.table(1)[:2] == blocks.table(0)[:2]
    assert copied == [(blocks.table(0)[2], blocks.table(1)[2])]
    assert blocks.table(0)[2] != blocks.table(1)[2]
    blocks.check()
    blocks.free(0)
    blocks.check()
    assert blocks.used_blocks == 3
    assert blocks.extend(1, 12)
    blocks.computed(1, [*PROMPT, 7], 12)
    assert found(blocks, [*PROMPT, 7, 7]) == 12


def test_a_fork_of_full_blocks_copies_nothing_and_needs_no_free_block():
    blocks = manager(num_blocks=4)
    ran(blocks, 0, PROMPT)
    assert blocks.fork(0, 1, 8) == []
    assert blocks.table(1) == blocks.table(0)[:2]
    assert blocks.fork(0, 2, 9) is None
    blocks.check()
    assert not blocks.extend(1, 9)
    blocks.free(0)
    assert blocks.extend(1, 9)
    blocks.computed(1, [*PROMPT[:8], 1], 9)
    blocks.check()


def test_clear_forgets_sequences_and_prefixes():
    blocks = manager()
    ran(blocks, 0, PROMPT)
    blocks.clear()
    assert (blocks.used_blocks, found(blocks, PROMPT)) == (0, 0)
    assert ran(blocks, 0, PROMPT) == (0, 0)


def test_what_was_looked_up_and_found_is_counted():
    blocks = manager(num_blocks=4)
    ran(blocks, 0, PROMPT)
    assert blocks.begin(1, PROMPT, b"") is None
    blocks.free(0)
    ran(blocks, 1, PROMPT)
    assert blocks.stats == PrefixCacheStats(queried_tokens=22, cached_tokens=8, evictions=0)
    blocks.free(1)
    ran(blocks, 2, [0] * 12, use_cached=False)
    assert blocks.stats == PrefixCacheStats(queried_tokens=22, cached_tokens=8, evictions=2)


def test_numbers_that_are_in_use_are_not_given_out_again():
    blocks = manager()
    blocks.begin(0, PROMPT, b"")
    with pytest.raises(AssertionError, match="sequence 0 has blocks"):
        blocks.begin(0, PROMPT, b"")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda b: b.table(0).pop(), r"block \d counts 1 references, not 0"),
        (lambda b: b.computed(0, PROMPT, 3), "sequence 0 has 2 of 0 digests"),
        (lambda b: b.fork(0, 2, 12), "sequence 0 writes to block . of another"),
        (lambda b: b._pools[0].name(b.table(0)[2], b"a"), "writes to block ., which is named"),
        (lambda b: b._count.__setitem__(0, 5), "lost count"),
        (lambda b: b._sequences[0].digests.reverse(), "sequence 0 has another's block"),
    ],
)
def test_the_check_finds_what_is_wrong(damage, said):
    blocks = manager()
    ran(blocks, 0, PROMPT)
    blocks.extend(0, 16)
    damage(blocks)
    with pytest.raises(AssertionError, match=said):
        blocks.check()
