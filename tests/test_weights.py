# SPDX-License-Identifier: Apache-2.0
"""The declaration of every weight, against names and shapes written out independently."""

from dataclasses import replace
from math import prod

import numpy as np
import pytest

import reference
from mesh_model import SMALL_7B, SMALL_HALF_B
from meshwen.models.parallel_model import ParallelModel
from meshwen.models.presets import preset
from meshwen.parallel.mesh import make_mesh
from meshwen.weights.declaration import unflatten
from meshwen.weights.layout import WeightTable

ODD = replace(SMALL_HALF_B, head_dim=10, vocab_size=997, intermediate_size=301)
# Parameters of the published checkpoints, as their safetensors headers add up.
PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
}


def weight_table(config, mesh: str) -> WeightTable:
    return ParallelModel(config, make_mesh(mesh), np.dtype(np.float32)).weights


@pytest.mark.parametrize("config", [SMALL_7B, SMALL_HALF_B, ODD], ids=["7b", "half_b", "odd"])
@pytest.mark.parametrize("mesh", ["1", "2x4"])
def test_names_and_shapes_are_those_of_a_checkpoint_on_every_mesh(config, mesh):
    declarations = weight_table(config, mesh).declarations
    declared = {one.name: one.shape(config.sizes) for one in declarations}
    assert declared == reference.tensor_shapes(config)
    assert len(declarations) == len(declared)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    for mesh in ("1", "1x32"):
        assert weight_table(preset(name), mesh).parameters == PUBLISHED[name]


@pytest.mark.parametrize("mesh", ["1", "3", "1x8", "2x4", "1x32", "data=2,model=4"])
def test_a_device_holds_an_equal_part_of_what_is_split_and_all_of_what_is_not(mesh):
    weights = weight_table(ODD, mesh)
    n = weights.plan.model_devices
    for weight in weights.declared:
        whole, part = weight.shape, weight.shard_shape
        split = [axis != "embed" for axis in weight.axes]
        assert part == tuple(size // n if s else size for size, s in zip(whole, split, strict=True))
        assert sum(split) <= 1
        original = weight.declaration.shape(ODD.sizes)[:: -1 if weight.inputs_first else 1]
        assert all(big >= small for big, small in zip(whole, original, strict=True))
        assert n > 1 or whole == original


def test_projections_are_kept_as_in_by_out():
    shapes = {weight.path: weight.shape for weight in weight_table(SMALL_7B, "1").declared}
    assert shapes["model.layers.1.mlp.up_proj.weight"] == (224, 1184)
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (1184, 224)
    assert shapes["lm_head.weight"] == (224, 1003)
    assert shapes["model.embed_tokens.weight"] == (1003, 224)


def test_a_device_of_7b_on_1x8_holds_an_eighth_and_its_padding():
    weights = weight_table(preset("qwen2.5-7b"), "1x8")
    a_layer = (
        2 * 3584  # norms
        + (3584 + 1)
        * 4
        * 128  # query projection: 4 slots, one of them empty on every second device
        + 2 * (3584 + 1) * 128  # one key/value head
        + 4 * 128 * 3584  # output projection
        + 3 * 3584 * 18944 // 8
    )
    expected = 28 * a_layer + 3584 + 2 * 152064 // 8 * 3584
    assert sum(prod(weight.shard_shape) for weight in weights.declared) == expected


def test_dotted_names_nest_and_numbers_count_a_list():
    tree = unflatten([("a.b", 1), ("a.c.d", 2)] + [(f"layers.{i}.w", i) for i in range(12)])
    assert tree == {"a": {"b": 1, "c": {"d": 2}}, "layers": [{"w": i} for i in range(12)]}
    assert unflatten({"layers.1.w": "b", "layers.0.w": "a"}) == {"layers": [{"w": "a"}, {"w": "b"}]}
