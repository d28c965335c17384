# SPDX-License-Identifier: Apache-2.0
"""Plans: logical axes on mesh axes, and what stands at each position of a padded axis."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, PartitionSpec

from mesh_model import SMALL_7B
from meshwen.models import qwen2
from meshwen.parallel.heads import PADDING
from meshwen.parallel.mesh import make_mesh
from meshwen.parallel.plan import LOGICAL_AXIS_RULES, ParallelPlan

MESHES = ("1", "3", "1x8", "2x4", "1x32", "data=2,model=4", "data=4")


@pytest.mark.parametrize(
    ("mesh", "model", "batch"),
    [
        ("1", None, None),
        ("8", "model", None),
        ("1x8", "model1", None),
        ("8x1", "model0", None),
        ("2x4", ("model0", "model1"), None),
        ("data=2,model=4", "model", "data"),
        ("data=4", None, "data"),
        ("data=1,model=2", "model", None),
    ],
)
def test_logical_axes_go_to_the_mesh_axes_of_more_than_one_device(mesh, model, batch):
    plan = ParallelPlan(SMALL_7B.sizes, make_mesh(mesh))
    for axis in ("vocab", "query", "key_value", "heads", "mlp"):
        assert plan.spec(axis) == PartitionSpec(model)
    for axis in ("embed", "length", "head_dim"):
        assert plan.spec(axis) == PartitionSpec(None)
    assert plan.spec("batch", "length", "vocab") == PartitionSpec(batch, None, model)
    assert plan.model_devices * plan.data_devices == plan.mesh.size


@pytest.mark.parametrize(
    "axes", [("vocab", "mlp"), ("query", "query"), ("heads", "embed", "vocab")]
)
def test_two_axes_on_the_same_devices_are_refused(axes):
    with pytest.raises(ValueError, match="split over the same mesh axes"):
        ParallelPlan(SMALL_7B.sizes, make_mesh("2x4")).spec(*axes)


def test_an_axis_without_a_rule_is_refused():
    with pytest.raises(KeyError, match="expert"):
        ParallelPlan(SMALL_7B.sizes, make_mesh("2")).spec("expert")


def test_every_axis_of_every_weight_has_a_rule():
    assert {a for w in qwen2.weights(SMALL_7B) for a in w.axes} <= LOGICAL_AXIS_RULES.keys()


def test_plans_of_equal_configs_on_one_mesh_are_equal():
    first, second = (ParallelPlan(replace(SMALL_7B).sizes, make_mesh("2x4")) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.parametrize("mesh", MESHES)
def test_padding_comes_last_and_is_less_than_one_position_a_device(mesh):
    plan = ParallelPlan(SMALL_7B.sizes, make_mesh(mesh))
    for axis, size in (("vocab", 1003), ("mlp", 1184)):
        source = plan.axis_source(axis).tolist()
        padding = source[size:]
        assert source[:size] == list(range(size))
        assert padding == [PADDING] * len(padding)
        assert len(padding) < plan.model_devices
        assert len(source) % plan.model_devices == 0
    assert plan.axis_source("embed").tolist() == list(range(224))


@given(
    kv=st.integers(1, 6),
    group=st.integers(1, 8),
    n=st.integers(1, 64),
    size=st.sampled_from([2, 8]),
)
def test_projection_rows_are_those_of_the_heads_on_each_device(kv, group, n, size):
    config = replace(
        SMALL_7B, num_attention_heads=kv * group, num_key_value_heads=kv, head_dim=size
    )
    plan = ParallelPlan(config.sizes, AbstractMesh((n,), ("model",)))
    query, key_value = plan.axis_source("query").tolist(), plan.axis_source("key_value").tolist()
    slots = plan.heads.device_query_heads().reshape(-1).tolist()
    assert query == _rows_of(slots, size)
    assert key_value == _rows_of(plan.heads.device_key_value_heads().reshape(-1).tolist(), size)
    assert sorted(row for row in query if row != PADDING) == list(range(kv * group * size))
    assert {*key_value} - {PADDING} == {*range(kv * size)}
    assert len(query) % n == len(key_value) % n == 0


def _rows_of(heads: list[int], size: int) -> list[int]:
    rows = []
    for head in heads:
        for i in range(size):
            rows.append(PADDING if head == PADDING else head * size + i)
    return rows


@pytest.mark.parametrize("mesh", ["1x8", "2x4", "8x4", "data=2,model=4"])
def test_shards_lie_on_devices_in_row_major_order(mesh):
    plan = ParallelPlan(SMALL_7B.sizes, make_mesh(mesh))
    rows = len(plan.axis_source("vocab"))
    index = plan.sharding("vocab", "embed").devices_indices_map((rows, 224))
    local = rows // plan.model_devices
    for number, device in enumerate(plan.mesh.devices.flat):
        start = number % plan.model_devices * local
        assert np.arange(rows)[index[device][0]].tolist() == list(range(start, start + local))
