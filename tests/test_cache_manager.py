# SPDX-License-Identifier: Apache-2.0
"""The cache's rows and growth, with arrays that only say who wrote where."""

import numpy as np
import pytest

from meshwen.cache.budget import CacheBudget
from meshwen.cache.manager import CacheManager
from meshwen.errors import MeshwenError


class Programs:
    """One array of rows and positions in the place of a cache; part after part, as on a mesh."""

    def __init__(self, parts: int):
        self._parts = parts

    def empty_cache(self, batch, length):
        return np.zeros((batch, length), int)

    def resized(self, cache, batch, length):
        parts, (rows, old) = self._parts, cache.shape
        new = np.zeros((parts, batch // parts, length), int)
        new[:, : rows // parts, :old] = cache.reshape(parts, -1, old)
        return new.reshape(batch, length)

    def without_row(self, cache, row):
        cache = cache.copy()
        cache[row] = 0
        return cache


def manager(parts=1, positions=10**6, max_num_seqs=8) -> CacheManager:
    """One that may have so many positions in all rows of a part."""
    return CacheManager(Programs(parts), CacheBudget(max_num_seqs, 1000, parts, 1, positions))


def shape(cache: CacheManager) -> tuple[int, int]:
    rows, length = cache.arrays.shape
    assert cache.batch_size == rows
    assert cache.has_position(length - 1)
    assert not cache.has_position(length)
    return rows, length


def test_an_empty_cache_is_as_large_as_what_waits_needs():
    cache = manager()
    assert cache.make_room(waiting=3, positions=17)
    assert shape(cache) == (4, 24)
    assert not cache.make_room(waiting=4, positions=20)  # As it is.
    assert cache.make_room(waiting=1, positions=5)
    assert shape(cache) == (1, 16)


def test_sequences_get_the_first_free_row_of_their_part_where_it_is_long_enough():
    cache = manager(parts=2)
    cache.make_room(waiting=4, positions=16)
    assert not cache.allocate(0, positions=17, part=0)
    assert [cache.allocate(n, 16, part) for n, part in ((0, 1), (1, 0), (2, 1))] == [True] * 3
    assert [cache.row(n) for n in range(3)] == [2, 0, 3]
    assert [cache.prefill_rows({1: 2}), cache.prefill_rows({0: 1, 1: 0})] == [[0, 1], [0, 0]]
    assert not cache.allocate(3, 1, part=1)
    cache.free(0, zero=False)
    assert cache.allocate(3, 1, part=1)
    assert cache.row(3) == 2


@pytest.mark.parametrize("parts", [1, 2])
def test_rows_keep_their_contents_when_rows_are_added_and_made_longer(parts):
    cache = manager(parts)
    cache.make_room(waiting=2 * parts, positions=16)
    for number in range(2 * parts):
        assert cache.allocate(number, 16, number % parts)
        cache.arrays[cache.row(number)] = 1 + number
    assert cache.make_room(waiting=1, positions=20)
    assert shape(cache) == (4 * parts, 24)
    for number in range(2 * parts):
        assert cache.arrays[cache.row(number)].tolist() == [1 + number] * 16 + [0] * 8
    assert cache.allocate(9, 20, parts - 1)
    assert not cache.arrays[cache.row(9)].any()


def test_a_running_cache_never_shrinks():
    cache = manager()
    cache.make_room(waiting=2, positions=30)
    cache.allocate(0, 30, 0)
    assert not cache.make_room(waiting=1, positions=5)
    assert shape(cache) == (2, 32)


def test_where_memory_lacks_for_rows_only_length_grows_and_then_nothing():
    cache = manager(positions=16 + 48)  # The old and the new one exist at the same time.
    cache.make_room(waiting=1, positions=16)
    cache.allocate(0, 16, 0)
    assert cache.make_room(waiting=1, positions=40)  # Not two rows.
    assert shape(cache) == (1, 48)
    assert not cache.make_room(waiting=1, positions=40)


def test_rows_are_doubled_in_length_for_answers_or_take_the_next_shape_bucket():
    cache = manager(positions=16 + 32)
    cache.make_room(waiting=1, positions=16)
    cache.allocate(0, 16, 0)
    assert [cache.has_position(n) for n in (15, 16)] == [True, False]
    assert cache.extend(positions=500)
    assert shape(cache) == (1, 32)
    assert not cache.extend(positions=500)
    short = manager(positions=16 + 24)
    short.make_room(waiting=1, positions=16)
    short.allocate(0, 16, 0)
    assert short.extend(positions=500)
    assert shape(short) == (1, 24)


def test_rows_are_not_made_longer_than_answers_may_become():
    cache = manager()
    cache.make_room(waiting=1, positions=64)
    cache.allocate(0, 64, 0)
    assert cache.extend(positions=70)
    assert shape(cache) == (1, 96)


def test_a_row_is_cleared_for_the_next_sequence_only_where_that_is_asked_for():
    cache = manager()
    cache.make_room(waiting=2, positions=16)
    for number in (0, 1):
        cache.allocate(number, 16, 0)
        cache.arrays[cache.row(number)] = 7
    cache.free(0, zero=True)
    cache.free(1, zero=False)
    assert cache.arrays.any(axis=1).tolist() == [False, True]
    assert cache.allocate(2, 16, 0)
    assert cache.row(2) == 0


def test_too_long_a_sequence_is_an_error_and_fewer_rows_are_warned_of(caplog):
    cache = manager(positions=70)
    with pytest.raises(MeshwenError, match="KV cache"):
        cache.make_room(waiting=1, positions=65)
    assert cache.make_room(waiting=5, positions=30)
    assert shape(cache) == (2, 32)
    assert "has room for 2 of 5 sequences of 32 tokens" in caplog.text


def test_clearing_drops_arrays_and_rows():
    cache = manager()
    cache.make_room(waiting=1, positions=16)
    cache.allocate(0, 16, 0)
    cache.clear()
    assert (cache.batch_size, cache.has_position(0), cache.arrays) == (0, False, ())
    cache.make_room(waiting=1, positions=16)
    assert cache.allocate(0, 16, 0)
