# SPDX-License-Identifier: Apache-2.0
"""Weights on the devices: the checkpoint's bits in their places, zeros in the padding."""

from dataclasses import replace
from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest

import reference
from checkpoint_writers import write_model
from mesh_model import SMALL_7B, SMALL_HALF_B, memory_checkpoint, whole
from meshwen.checkpoints import open_checkpoint
from meshwen.errors import MeshwenError
from meshwen.models.parallel_model import ParallelModel
from meshwen.ops.formats import Packed
from meshwen.ops.weight import Weight
from meshwen.parallel.heads import PADDING
from meshwen.parallel.mesh import make_mesh
from meshwen.parallel.plan import ParallelPlan
from meshwen.weights import loading
from meshwen.weights.finite import check_finite
from meshwen.weights.layout import WeightTable
from meshwen.weights.loading import dummy_params, load_params

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Nothing here divides by most meshes: 7 query and key/value pairs of heads, odd vocabulary and MLP.
ODD = replace(
    SMALL_HALF_B,
    vocab_size=61,
    hidden_size=24,
    intermediate_size=43,
    head_dim=4,
    tie_word_embeddings=False,
)
pytestmark = pytest.mark.usefixtures("unoptimised")
MESHES = ("1", "3", "5", "2x4", "1x32", "data=2,model=4")


def weight_table(config, mesh: str, dtype=BFLOAT16, quantization=None) -> WeightTable:
    return ParallelModel(config, make_mesh(mesh), np.dtype(dtype), "fast", quantization).weights


def by_name(params, prefix: str = "") -> dict[str, Weight]:
    """The pytree's weights by the names of a checkpoint."""
    if isinstance(params, Weight):
        return {prefix[:-1]: params}
    items = enumerate(params) if isinstance(params, list) else params.items()
    return {k: v for key, node in items for k, v in by_name(node, f"{prefix}{key}.").items()}


def random_bits(config, dtype: np.dtype, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of all finite bit patterns: negative zeros, subnormals and huge values too."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in reference.tensor_shapes(config).items():
        integer = np.dtype(f"u{dtype.itemsize}")
        bits = rng.integers(0, np.iinfo(integer).max, shape, integer, endpoint=True)
        values = bits.view(dtype)
        values = np.where(np.isfinite(values.astype(np.float32)), values, np.asarray(-0.0, dtype))
        weights[name] = values.astype(dtype)
    return weights


def on_devices(name: str, tensor: np.ndarray, plan: ParallelPlan) -> np.ndarray:
    """What all devices together hold of a tensor, put together piece by piece."""
    kind = name.split(".")[-2]
    axis = 1 if kind in ("o_proj", "down_proj") else 0
    if kind in ("q_proj", "o_proj", "k_proj", "v_proj"):
        slots = (
            plan.heads.device_query_heads()
            if kind in "q_proj o_proj"
            else plan.heads.device_key_value_heads()
        )
        heads = np.split(tensor, tensor.shape[axis] // plan.sizes.head_dim, axis)
        empty = np.zeros_like(heads[0])
        pieces = [empty if slot == PADDING else heads[slot] for slot in slots.reshape(-1)]
        tensor = np.concatenate(pieces, axis)
    elif "norm" not in kind:
        missing = -tensor.shape[axis] % plan.model_devices
        pad = [(0, 0)] * tensor.ndim
        pad[axis] = (0, missing)
        tensor = np.pad(tensor, pad)
    return tensor.T if kind.endswith("_proj") or kind == "lm_head" else tensor


def same_bits(found, expected) -> bool:
    found, expected = whole(found), np.ascontiguousarray(expected)
    return (found.dtype, found.shape, found.tobytes()) == (
        expected.dtype,
        expected.shape,
        expected.tobytes(),
    )


@pytest.fixture(scope="module", params=[BFLOAT16, np.dtype(np.float32)], ids=str)
def checkpoint(request, tmp_path_factory):
    """(dtype, original tensors, an open safetensors checkpoint of them)."""
    weights = random_bits(ODD, request.param)
    folder = write_model(tmp_path_factory.mktemp("checkpoint"), ODD, weights)
    with open_checkpoint(str(folder)) as opened:
        assert opened.config == ODD
        yield request.param, weights, opened


@pytest.mark.parametrize("mesh", MESHES)
def test_a_checkpoint_loads_bit_for_bit(checkpoint, mesh):
    dtype, weights, opened = checkpoint
    table = weight_table(ODD, mesh, dtype)
    arrays = by_name(load_params(opened, table))
    assert arrays.keys() == weights.keys()
    for name, tensor in weights.items():
        assert same_bits(arrays[name], on_devices(name, tensor, table.plan)), name


def test_large_parts_are_packed_by_and_by(checkpoint, monkeypatch):
    dtype, weights, opened = checkpoint
    monkeypatch.setattr("meshwen.weights.loading._PACKED_ROWS", 32)
    table = weight_table(ODD, "1", dtype)
    arrays = by_name(load_params(opened, table))
    for name, tensor in weights.items():
        assert same_bits(arrays[name], on_devices(name, tensor, table.plan))


@pytest.mark.parametrize("mesh", ["1", "1x8", "data=2,model=4"])
def test_float32_is_cast_to_bfloat16_by_rounding_to_nearest_even(mesh):
    weights = random_bits(ODD, np.dtype(np.float32))
    table = weight_table(ODD, mesh)
    arrays = by_name(load_params(memory_checkpoint(ODD, weights), table))
    for name, tensor in weights.items():
        bits = tensor.view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        expected = rounded.astype(np.uint16).view(BFLOAT16)
        assert same_bits(arrays[name], on_devices(name, expected, table.plan)), name


@pytest.mark.parametrize("mesh", MESHES)
def test_each_device_holds_its_declared_part_and_no_more(mesh):
    table = weight_table(ODD, mesh, np.float32)
    weights = random_bits(ODD, np.dtype(np.float32))
    loaded = by_name(load_params(memory_checkpoint(ODD, weights), table))
    made = by_name(dummy_params(table))
    for weight in table.declared:
        for found in (loaded[weight.path], made[weight.path]):
            leaf, shape = found.leaf, weight.shard_shape
            if isinstance(leaf, Packed):
                assert leaf.shape == shape
                inputs, outputs = shape
                (leaf,), shape = jax.tree.leaves(leaf), (-(-outputs // 32), inputs, 32, 1)
            assert leaf.sharding.is_equivalent_to(weight.sharding, leaf.ndim)
            assert len(leaf.addressable_shards) == table.plan.mesh.size
            shapes = {shard.data.shape for shard in leaf.addressable_shards}
            assert shapes == {shape}


def test_a_source_is_asked_for_each_part_of_a_weight_and_never_for_all_of_it(monkeypatch):
    opened = memory_checkpoint(SMALL_7B, random_bits(SMALL_7B, BFLOAT16))
    read, original = [], type(opened.tensors["lm_head.weight"]).read

    def recorded(self, index=()):
        part = original(self, index)
        read.append((self.name, part.nbytes / self.nbytes))
        return part

    monkeypatch.setattr(type(opened.tensors["lm_head.weight"]), "read", recorded)
    load_params(opened, weight_table(SMALL_7B, "1x8"))
    for name, share in read:
        assert share <= (1 if "norm" in name else 1 / 4), name
    for name in ("lm_head.weight", "model.layers.0.mlp.down_proj.weight"):
        assert sum(share for n, share in read if n == name) == pytest.approx(1)


def test_progress_counts_every_weight():
    calls = []
    table = weight_table(ODD, "2")
    total = len(table.declared)
    dummy_params(table, progress=lambda *call: calls.append(call))
    assert calls == [(i, total) for i in range(total + 1)]
    opened = memory_checkpoint(ODD, random_bits(ODD, BFLOAT16))
    load_params(opened, table, progress=lambda *call: calls.append(call))
    assert calls == [(i, total) for i in range(total + 1)] * 2


NAMES = [
    "model.embed_tokens.weight",
    "model.layers.1.self_attn.k_proj.bias",
    "model.layers.0.mlp.down_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]


def refusal(config, weights, mesh: str = "2") -> str:
    with pytest.raises(MeshwenError) as error:
        load_params(memory_checkpoint(config, weights), weight_table(config, mesh))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_named_with_its_shape(name):
    weights = random_bits(ODD, BFLOAT16)
    shape = list(weights.pop(name).shape)
    assert f"memory: tensor {name} {shape} is missing" in refusal(ODD, weights)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(name):
    weights = random_bits(ODD, BFLOAT16)
    expected = list(weights[name].shape)
    weights[name] = np.concatenate([weights[name]] * 2)
    found = [2 * expected[0], *expected[1:]]
    message = refusal(ODD, weights)
    assert f"tensor {name} has shape {found}" in message
    assert f"the config makes it {expected}" in message


def test_a_transposed_projection_is_refused():
    weights = random_bits(ODD, BFLOAT16)
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].T
    assert "up_proj.weight has shape [24, 43], but the config makes it [43, 24]" in refusal(
        ODD, weights
    )


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.bias", "score"]
)
def test_an_unexpected_tensor_is_named_with_its_shape(name):
    weights = random_bits(ODD, BFLOAT16) | {name: np.zeros((3, 5), BFLOAT16)}
    assert f'unexpected tensor "{name}" [3, 5]' in refusal(ODD, weights)


def test_rope_frequencies_buffers_of_old_checkpoints_are_ignored():
    weights = random_bits(ODD, BFLOAT16)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    opened = memory_checkpoint(ODD, weights | {name: np.zeros(2, np.float32)})
    assert by_name(load_params(opened, weight_table(ODD, "2"))).keys() == set(weights)


@pytest.mark.parametrize("with_copy", [False, True])
def test_a_tied_checkpoint_loads_with_and_without_a_copy_of_the_head(with_copy):
    tied = replace(ODD, tie_word_embeddings=True)
    weights = random_bits(tied, BFLOAT16)
    copy = {"lm_head.weight": weights["model.embed_tokens.weight"]} if with_copy else {}
    table = weight_table(tied, "3")
    arrays = by_name(load_params(memory_checkpoint(tied, weights | copy), table))
    assert arrays.keys() == weights.keys()
    name = "model.embed_tokens.weight"
    expected = on_devices(name, weights[name], table.plan)
    assert same_bits(arrays[name], expected.T if table.format else expected)


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused():
    tied = replace(ODD, tie_word_embeddings=True)
    weights = random_bits(tied, BFLOAT16)
    head = weights["model.embed_tokens.weight"].copy()
    head[-1, -1] = 3
    checkpoint = memory_checkpoint(tied, weights | {"lm_head.weight": head})
    with pytest.raises(MeshwenError, match=r"ties lm_head\.weight to model\.embed_tokens"):
        load_params(checkpoint, weight_table(tied, "1"))


def test_integers_are_no_weights():
    weights = random_bits(ODD, BFLOAT16)
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = np.ones(weights[name].shape, np.int8)
    with pytest.raises(MeshwenError, match=f"{name} is int8, not floating-point"):
        load_params(memory_checkpoint(ODD, weights), weight_table(ODD, "1"))


def test_an_untied_checkpoint_without_a_head_is_refused():
    weights = random_bits(replace(ODD, tie_word_embeddings=True), BFLOAT16)
    assert "lm_head.weight [61, 24] is missing" in refusal(ODD, weights)


@pytest.fixture(scope="module")
def dummy_on_one_device():
    return {name: whole(a) for name, a in by_name(dummy_params(weight_table(ODD, "1"))).items()}


@pytest.mark.parametrize("mesh", ["3", "1x32", "data=2,model=4"])
def test_dummy_weights_are_the_same_on_every_mesh(dummy_on_one_device, mesh):
    table = weight_table(ODD, mesh)
    arrays = by_name(dummy_params(table))
    for weight in table.declared:
        name, one = weight.path, dummy_on_one_device[weight.path]
        original = one.T if weight.inputs_first else one
        assert same_bits(arrays[name], on_devices(name, original, table.plan)), name


def test_dummy_weights_have_the_spread_of_fresh_ones_and_differ_from_each_other():
    table = weight_table(SMALL_7B, "2", np.float32)
    arrays = {n: whole(a) for n, a in by_name(dummy_params(table)).items()}
    for name, array in arrays.items():
        values = array[array != 0]
        assert np.isfinite(values).all()
        assert np.abs(values - ("norm" in name)).max() <= 0.02 * 3**0.5 + 1e-6, name
        if values.size > 10_000:
            assert values.std() == pytest.approx(0.02, rel=0.02), name
            assert values.mean() == pytest.approx(0, abs=0.001), name
        assert len(np.unique(values)) > 0.98 * values.size, name
    up = "model.layers.{}.mlp.up_proj.weight"
    products = np.corrcoef([arrays[up.format(i)].reshape(-1) for i in range(2)])
    assert abs(products[0, 1]) < 0.01
    other_seed = by_name(dummy_params(table, seed=1))
    assert not np.array_equal(whole(other_seed[up.format(0)]), arrays[up.format(0)])


DAMAGED = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("value", "dtype", "mesh", "quantization", "said"),
    [
        (np.nan, BFLOAT16, "1", None, "holds NaN"),
        (-np.inf, np.float16, "3", None, "holds infinite numbers"),
        (np.nan, np.float32, "2x4", "int8", "holds NaN"),
        (-np.nan, np.float64, "1", "int8", "holds NaN"),
        (np.inf, BFLOAT16, "5", "int8", "holds infinite numbers"),
        (3.4e38, np.float32, "1", None, "holds numbers that are too large for bfloat16"),
        (1e300, np.float64, "1", "int8", "holds numbers that are too large for float32"),
    ],
)
def test_a_weight_that_is_no_number_is_refused_by_name(value, dtype, mesh, quantization, said):
    weights = {name: a.astype(dtype) for name, a in random_bits(ODD, np.dtype(np.float16)).items()}
    table = weight_table(ODD, mesh, quantization=quantization)
    load_params(memory_checkpoint(ODD, weights), table)
    weights[DAMAGED][-1, -1] = value
    with pytest.raises(MeshwenError, match=f"memory: tensor {DAMAGED} {said}") as caught:
        load_params(memory_checkpoint(ODD, weights), table)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64])
def test_every_finite_number_is_taken_and_no_other(dtype):
    dtype = np.dtype(dtype)
    info = ml_dtypes.finfo(dtype)
    finite = np.array([0, -0.0, info.max, info.min, info.tiny, -info.tiny], dtype)
    check_finite(finite, dtype, "x")
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        for shape in ((), (7,), (700, 500)):  # More than is looked at at a time.
            values = np.zeros(shape, dtype)
            check_finite(values, dtype, "x")
            values[(...,) if shape == () else (-1,) * len(shape)] = bad
            with pytest.raises(MeshwenError):
                check_finite(values.T, dtype, "x")


def test_what_rounds_to_infinity_is_too_large():
    largest = np.float32(ml_dtypes.finfo(BFLOAT16).max)
    half_a_step = np.float32(2.0 ** (127 - 8))
    check_finite(np.array([np.nextafter(largest + half_a_step, 0)]), BFLOAT16, "x")
    assert np.isinf((largest + half_a_step).astype(BFLOAT16))
    with pytest.raises(MeshwenError, match="too large"):
        check_finite(np.array([largest + half_a_step]), BFLOAT16, "x")


def test_a_damaged_head_beside_its_equal_is_named_for_what_it_is():
    tied = replace(ODD, tie_word_embeddings=True)
    weights = random_bits(tied, BFLOAT16)
    weights["model.embed_tokens.weight"][3, 3] = np.nan
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    assert "model.embed_tokens.weight holds NaN" in refusal(tied, weights)


def test_weights_that_do_not_fit_say_that_the_config_names_a_quantisation():
    weights = random_bits(ODD, BFLOAT16)
    del weights[DAMAGED]
    opened = replace(memory_checkpoint(ODD, weights), quantization="gptq")
    with pytest.raises(MeshwenError, match=r'is missing; .* names "gptq", which is not supported'):
        load_params(opened, weight_table(ODD, "1"))


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_weights_that_do_not_fit_a_device_are_refused_before_any_is_placed(
    monkeypatch, quantization
):
    table = weight_table(ODD, "2x4", quantization=quantization)
    arrays = jax.tree.leaves(dummy_params(table))
    held = sum(array.addressable_shards[0].data.nbytes for array in arrays)
    monkeypatch.setattr(loading, "free_bytes", lambda devices: held - 1)
    opened = memory_checkpoint(ODD, random_bits(ODD, BFLOAT16))
    for load in (partial(dummy_params), partial(load_params, opened)):
        with pytest.raises(MeshwenError, match=r"the weights need .* on each device"):
            load(table, lambda done, total: pytest.fail("a weight was placed"))
    monkeypatch.setattr(loading, "free_bytes", lambda devices: held)
    load_params(opened, table)
