# SPDX-License-Identifier: Apache-2.0
"""Head layouts hold every head once, beside its key/value head, for any counts and any devices."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshwen.parallel.heads import PADDING, head_layout

KV_HEADS = st.integers(1, 16)
GROUPS = st.integers(1, 16)
DEVICES = st.integers(1, 64)


def qwen_sizes(test):
    """Adds the head counts of every Qwen2.5 size on the meshes that matter most."""
    for kv, group in ((2, 7), (2, 6), (2, 8), (4, 7), (8, 5), (8, 8)):
        for devices in (1, 3, 4, 8, 32):
            test = example(kv=kv, group=group, n=devices)(test)
    return test


@qwen_sizes
@given(kv=KV_HEADS, group=GROUPS, n=DEVICES)
def test_every_query_head_is_in_one_slot_beside_its_own_key_value_head(kv, group, n):
    layout = head_layout(kv * group, kv, n)
    query, key_value = (
        layout.device_query_heads().tolist(),
        layout.device_key_value_heads().tolist(),
    )
    assert len(query) == len(key_value) == n
    seen = []
    for device_queries, device_keys in zip(query, key_value, strict=True):
        assert len(device_queries) == len(device_keys) == layout.local_key_value_heads
        for slots, key_head in zip(device_queries, device_keys, strict=True):
            assert len(slots) == layout.group_size
            heads = [head for head in slots if head != PADDING]
            assert all(head // group == key_head for head in heads)
            assert PADDING <= key_head < kv
            seen += heads
    assert sorted(seen) == list(range(kv * group))


@given(kv=KV_HEADS, group=GROUPS, n=DEVICES)
def test_the_reported_padding_and_copies_are_those_of_the_slots(kv, group, n):
    layout = head_layout(kv * group, kv, n)
    assert layout.padding_query_heads == int((layout.device_query_heads() == PADDING).sum())
    assert layout.local_query_heads == layout.device_query_heads()[0].size
    held = Counter(layout.device_key_value_heads().reshape(-1).tolist())
    assert {head: held[head] for head in range(kv)} == dict.fromkeys(range(kv), layout.pieces)
    assert layout.key_value_copies == layout.device_key_value_heads().size / kv


@qwen_sizes
@given(kv=KV_HEADS, group=GROUPS, n=DEVICES)
def test_no_layout_of_equal_devices_is_cheaper(kv, group, n):
    layout = head_layout(kv * group, kv, n)
    cheapest = min(
        keys * slots + keys
        for keys in range(1, kv * group + 1)
        for slots in range(1, group + 1)
        if kv * -(-group // slots) <= n * keys  # every piece of every head finds a place
    )
    assert layout.local_query_heads + layout.local_key_value_heads == cheapest


@pytest.mark.parametrize(
    ("devices", "slots_a_device", "devices_a_key_value_head"),
    [(1, 28, 1), (2, 14, 1), (4, 7, 1), (8, 4, 2), (32, 1, 8)],
)
def test_7b_lies_as_the_design_says(devices, slots_a_device, devices_a_key_value_head):
    layout = head_layout(28, 4, devices)
    assert layout.local_query_heads == slots_a_device
    assert layout.local_key_value_heads == max(1, 4 // devices)
    holders = [np.any(layout.device_key_value_heads() == head, axis=1).sum() for head in range(4)]
    assert holders == [devices_a_key_value_head] * 4


def test_7b_on_8_devices_slot_by_slot():
    layout = head_layout(28, 4, 8)
    assert layout.device_key_value_heads()[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert layout.device_query_heads()[:4, 0].tolist() == [
        [0, 1, 2, 3],
        [4, 5, 6, PADDING],
        [7, 8, 9, 10],
        [11, 12, 13, PADDING],
    ]


def test_7b_on_32_devices_gives_each_key_value_head_8_neighbours_and_one_empty_slot():
    slots = head_layout(28, 4, 32).device_query_heads().reshape(4, 8)
    assert slots.tolist() == [[*range(7 * k, 7 * k + 7), PADDING] for k in range(4)]


@pytest.mark.parametrize("counts", [(0, 1, 1), (4, 0, 1), (4, 2, 0), (7, 2, 1), (2, 4, 1)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match=f"no head layout for {counts[0]} query"):
        head_layout(*counts)
