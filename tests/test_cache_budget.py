# SPDX-License-Identifier: Apache-2.0
"""How many KV blocks there are for the memory that there is."""

from math import ceil
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from mesh_model import shared_model
from meshwen.cache.budget import KVCachePlan
from meshwen.engine.options import EngineOptions
from meshwen.errors import MeshwenError
from tiny_model import ONE_LAYER


def test_more_tokens_than_the_context_of_the_model_are_refused():
    options = EngineOptions(max_model_len=ONE_LAYER.max_position_embeddings + 1)
    with pytest.raises(MeshwenError, match=r"max_model_len must be from 2 to .* context of 1100"):
        options.cache_plan(shared_model(ONE_LAYER).runner.model)


def planned(monkeypatch, free, parts=1, max_num_seqs=6, max_model_len=1000, memory=None):
    """Blocks of 32 positions of 100 bytes, for so many free bytes."""
    monkeypatch.setattr("meshwen.cache.budget._free_bytes", lambda plan: free)
    plan = SimpleNamespace(data_devices=parts)
    return KVCachePlan.of_memory(plan, 100, 32, max_num_seqs, max_model_len, memory)


def test_where_memory_suffices_there_are_blocks_for_all_sequences_of_the_most_tokens(monkeypatch):
    assert planned(monkeypatch, 10**9).num_blocks == 6 * 32 + 1
    assert planned(monkeypatch, 10**9, parts=4).num_blocks == 2 * 32 + 1
    assert planned(monkeypatch, 10**9, parts=8).num_blocks == 32 + 1
    assert planned(monkeypatch, 10**9, max_model_len=32).num_blocks == 6 + 1
    assert planned(monkeypatch, 10**9, max_model_len=33).num_blocks == 6 * 2 + 1


@pytest.mark.parametrize(
    ("blocks", "memory", "expected"),
    [
        (100, 1.0, 96),
        (96, 1.0, 96),
        (95, 1.0, 64),
        (100, 0.5, 48),
        (100, None, 64),  # 80.
        (192, 1.0, 192),
        (193, 1.0, 193),  # What is needed, and more for prefixes.
        (255, 1.0, 193),
        (257, 1.0, 256),
        (1000, 0.5, 384),
        (1000, None, 193),
        (15, 1.0, 15),
    ],
)
def test_a_share_of_memory_gives_a_shape_bucket_of_blocks_or_what_is_needed(
    monkeypatch, blocks, memory, expected
):
    for bytes_more in (0, 3199):
        found = planned(monkeypatch, int(blocks * 3200 + bytes_more), memory=memory)
        assert found.num_blocks == expected


def test_bytes_are_used_to_the_last_block_whatever_is_free(monkeypatch):
    assert planned(monkeypatch, 0, memory=100 * 3200 + 3199).num_blocks == 100
    assert planned(monkeypatch, 0, memory=10**9).num_blocks == 10**9 // 3200


def test_a_plan_says_what_it_has_room_for():
    found = KVCachePlan(4097, 32, 12_288, 1, 8, 32_768)
    assert (found.capacity, found.longest) == (131_072, 32_768)
    assert (found.block_bytes, found.bytes) == (393_216, 1_611_005_952)
    assert str(found) == (
        "KV cache: 4,096 blocks of 32 tokens, 1.61 GB on each device; room for 131,072 tokens, "
        "4.0 sequences of 32,768"
    )
    found = KVCachePlan(64, 16, 100, 2, 8, 1100)
    assert (found.capacity, found.longest) == (1008, 1008)
    assert str(found) == (
        "KV cache: 2 x 63 blocks of 16 tokens, 102 kB on each device; room for 2,016 tokens, "
        "1.8 sequences of 1,100"
    )


def test_a_sequence_that_no_part_has_room_for_is_refused_with_what_it_needs():
    found = KVCachePlan(4, 32, 100_000, 2, 8, 1000)
    found.check_fits(96)
    message = r"97 tokens needs 16.0 MB of KV cache .* of which 12.8 MB can be had: lower max_new_"
    with pytest.raises(MeshwenError, match=message):
        found.check_fits(97)


@pytest.mark.parametrize("memory", [3 * 3200 - 1, 1.0])
def test_memory_for_hardly_a_sequence_is_an_error(monkeypatch, memory):
    message = r"64 tokens needs 9.60 kB .* of which 6.40 kB can be had: .*raise kv_cache_memory"
    with pytest.raises(MeshwenError, match=message):
        planned(monkeypatch, 3 * 3200 - 1, memory=memory)
    assert planned(monkeypatch, 2 * 3200, max_model_len=32, memory=1.0).longest == 32


def test_a_plan_of_a_mesh_without_devices_needs_bytes():
    plan = EngineOptions().parallel_model(ONE_LAYER, AbstractMesh((2,), ("model",))).plan
    with pytest.raises(MeshwenError, match=r"no device is behind AbstractMesh\(.*give the model"):
        KVCachePlan.of_memory(plan, 100, 32, 1, 64)
    assert KVCachePlan.of_memory(plan, 100, 32, 1, 64, 10**6).num_blocks == 10**6 // 3200


@pytest.mark.parametrize(("memory", "share"), [(None, 0.8), ("50%", 0.5)])
def test_a_plan_is_of_the_options_and_of_the_memory_that_is_free(monkeypatch, memory, share):
    monkeypatch.setattr("meshwen.runtime.memory._free_host_bytes", lambda: 10_000_000)
    model = shared_model(ONE_LAYER).runner.model
    options = EngineOptions(max_num_seqs=100, max_model_len=1000, kv_cache_memory=memory)
    found = options.cache_plan(model)
    assert (found.token_bytes, found.block_size) == (model.token_bytes, model.backend.block_size)
    assert (found.parts, found.max_num_seqs, found.max_model_len) == (1, 100, 1000)
    assert share * 10**7 / 1.5 - found.block_bytes < found.bytes <= share * 10**7
    few = EngineOptions(max_num_seqs=3, max_model_len=50).cache_plan(model)
    assert few.num_blocks == 3 * ceil(50 / few.block_size) + 1


@example(seqs=64, longest=1000, parts=1, size=1, share=66 / 128_000)  # A bucket of 64 is too few.
@given(
    seqs=st.integers(1, 64),
    longest=st.integers(1, 5000),
    parts=st.integers(1, 8),
    size=st.integers(1, 64),
    share=st.floats(0, 1),
)
def test_no_plan_is_larger_than_its_memory_or_without_it_than_is_needed(
    seqs, longest, parts, size, share
):
    memory = int(share * 2 * seqs * longest * 100) + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meshwen.cache.budget._free_bytes", lambda plan: memory)
        for asked in (memory, 1.0, None):
            try:
                found = KVCachePlan.of_memory(
                    SimpleNamespace(data_devices=parts), 100, size, seqs, longest, asked
                )
            except MeshwenError:
                given_bytes = memory if asked is not None else 0.8 * memory
                assert given_bytes < (ceil(min(longest, 64) / size) + 1) * size * 100
                continue
            assert found.bytes <= memory
            room = found.capacity // (ceil(longest / size) * size)
            assert asked is not None or room <= ceil(seqs / parts)
            if asked == memory:
                assert found.bytes + found.block_bytes > memory
