# SPDX-License-Identifier: Apache-2.0
"""What a cache may hold: rows and lengths for the memory that there is."""

import pytest
from jax.sharding import AbstractMesh

from mesh_model import shared_model
from meshwen.cache.budget import CacheBudget
from meshwen.engine.options import EngineOptions
from meshwen.errors import MeshwenError
from tiny_model import ONE_LAYER


def budget(parts=1, cache_bytes=10**9) -> CacheBudget:
    return CacheBudget(6, 64, parts, token_bytes=100, cache_bytes=cache_bytes)


def test_rows_are_powers_of_two_up_to_what_may_run():
    assert [budget().rows(n, 64) for n in (1, 2, 3, 5, 100)] == [1, 2, 4, 6, 6]
    assert [budget(parts=2).rows(n, 64) for n in (1, 2, 3, 5, 100)] == [2, 2, 4, 6, 6]


def test_fewer_rows_where_memory_is_short_and_none_is_an_error():
    assert budget(cache_bytes=5 * 6400).rows(100, 64) == 4
    assert budget(cache_bytes=6400).rows(100, 64) == 1
    with pytest.raises(MeshwenError, match=r"64 tokens needs 0.00 GB .* lower max_new_tokens"):
        budget(cache_bytes=6399).rows(1, 64)


def test_caches_that_exist_at_the_same_time_share_the_memory():
    assert budget(parts=2, cache_bytes=4000).holds((2, 16), (2, 24))
    assert not budget(parts=2, cache_bytes=3999).holds((2, 16), (2, 24))


def test_the_longest_cache_is_the_largest_shape_bucket_that_fits():
    assert [budget(cache_bytes=100 * n).longest for n in (15, 16, 31, 50)] == [0, 16, 24, 48]


def test_more_tokens_than_the_context_of_the_model_are_refused():
    options = EngineOptions(max_model_len=ONE_LAYER.max_position_embeddings + 1)
    with pytest.raises(MeshwenError, match=r"max_model_len must be from 2 to .* context of 1100"):
        options.cache_budget(shared_model(ONE_LAYER).runner.model)


def test_a_mesh_without_devices_has_no_memory():
    model = EngineOptions().parallel_model(ONE_LAYER, AbstractMesh((2,), ("model",)))
    with pytest.raises(MeshwenError, match=r"no device is behind AbstractMesh\(.*give the model"):
        EngineOptions().cache_budget(model)


def test_a_budget_is_a_share_of_the_free_memory_in_rows_of_a_device(monkeypatch):
    monkeypatch.setattr("meshwen.runtime.memory._free_host_bytes", lambda: 10_000_000)
    options = EngineOptions(max_num_seqs=3, max_model_len=50)
    found = options.cache_budget(shared_model(ONE_LAYER).runner.model)
    # One layer of 2 heads of 8 numbers, keys and values in float32.
    assert found == CacheBudget(3, 50, 1, token_bytes=2 * 8 * 8, cache_bytes=8_000_000)
