# SPDX-License-Identifier: Apache-2.0
"""int8 weights: what they stand for, what is multiplied with them, and that no mesh changes it."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

import reference
from emulated import every_instruction_set
from mesh_model import (
    SMALL_7B,
    SMALL_HALF_B,
    MeshModel,
    random_tokens,
    relative_error,
    shared_model,
)
from meshwen import Qwen2ForCausalLM
from meshwen.cli.app import app
from meshwen.errors import MeshwenError
from meshwen.models.parallel_model import ParallelModel
from meshwen.ops.cpu import kernels
from meshwen.ops.cpu.panels import INT8_PANELS, PANELS
from meshwen.ops.formats import Packed
from meshwen.ops.quant.int8 import INT8
from meshwen.ops.weight import Weight
from meshwen.parallel.mesh import make_mesh
from meshwen.weights.loading import dummy_params
from needs_kernels import needs_kernels

bfloat16 = ml_dtypes.bfloat16
QUANTISED = ("_proj.weight", "lm_head.weight")
# Every tile and several; a whole panel and parts of one, several groups and parts of one.
ROWS = [*range(1, 9), 13, 40]
SHAPES = [(32, 32), (64, 40), (896, 152), (152, 70), (37, 5), (1, 1)]


@pytest.fixture(params=every_instruction_set(int8=True))
def instructions(request, monkeypatch):
    request.param.use(monkeypatch)
    return request.param


def groups(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [n, c] with zeros behind, by groups of 32, and each group's largest size."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(len(x), -1, 32)
    return padded, np.abs(padded).max(axis=2, keepdims=True)


def weight_scales(weight: np.ndarray) -> np.ndarray:
    """float32 [out, groups, 1]: the least bfloat16 that is not below largest / 127."""
    exact = groups(weight)[1] / np.float32(127)
    near = exact.astype(bfloat16)
    return np.where(near < exact, np.nextafter(near, bfloat16(np.inf)), near).astype(np.float32)


def integer_product(x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x @ weight.T of quantised numbers, in float64: [M, in] x [out, in].

    Then what float32 may be off by: groups are exact, and each is scaled, rounded and added.
    """
    grouped, largest = groups(x)
    x_scale = largest / np.float32(127)
    inverse = np.float32(127) / np.where(largest, largest, 1)
    x_values = np.rint(grouped * inverse).astype(np.int64)
    scale = weight_scales(weight)
    values = np.rint(groups(weight)[0] / np.where(scale, scale, 1)).astype(np.int64)
    sums = np.einsum("mgk,ngk->mng", x_values, values)
    terms = sums * x_scale[:, None, :, 0].astype(np.float64) * scale[None, :, :, 0]
    return terms.sum(axis=2), (terms.shape[2] + 1) * 2.0**-24 * np.abs(terms).sum(axis=2)


quantised = partial(INT8_PANELS.pack, dtype=jnp.dtype(np.float32))
on_device = jax.jit(quantised)


def drawn(rows: int, contracted: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """x [rows, contracted] and a weight [columns, contracted], some numbers far larger."""
    rng = np.random.default_rng(rows)
    x, weight = (rng.standard_normal((n, contracted)) for n in (rows, columns))
    x[:, ::29] *= 50
    return x.astype(np.float32), weight.astype(np.float32)


def bits(array) -> np.ndarray:
    return np.asarray(array).view(np.int32)


@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
def test_a_weight_is_off_by_half_a_step_at_most(dtype):
    @jax.jit
    def program(weights):
        packed = [quantised(weight) for weight in weights]
        return packed, [one.unpacked().T for one in packed]

    weights = [drawn(1, *shape)[1].astype(dtype) for shape in SHAPES]
    for weight, found, stands_for in zip(weights, *program(weights), strict=True):
        assert found.values.dtype == jnp.int8
        assert found.scales.dtype == jnp.bfloat16
        steps = np.repeat(weight_scales(weight.astype(np.float32))[..., 0], 32, axis=1)
        error = np.abs(np.asarray(stands_for, np.float64) - weight.astype(np.float64))
        assert (error <= 0.5001 * steps[:, : weight.shape[1]]).all()
        assert np.asarray(found.values).min() >= -127


@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
@pytest.mark.parametrize("format", [INT8, INT8_PANELS, PANELS], ids=lambda one: one.name)
def test_numbers_times_signs_are_rounded_no_further(format, dtype):
    rng = np.random.default_rng(0)
    for outputs, inputs in ((33, 45), (64, 32), (1, 1)):
        packed = format.pack(jnp.asarray(drawn(1, inputs, outputs)[1]), jnp.dtype(dtype))
        factors = rng.integers(-1, 2, packed.shape, np.int8)
        found = packed.times(jnp.asarray(factors))
        expected = np.asarray(packed.unpacked(), np.float32) * factors
        np.testing.assert_array_equal(np.asarray(found.unpacked(), np.float32), expected)
        assert jax.tree.structure(found) == jax.tree.structure(packed)


def test_zeros_stay_zeros_and_what_is_not_finite_is_not_hidden():
    weight = np.zeros((5, 64), np.float32)
    weight[1, 40], weight[2, 3] = np.inf, np.nan
    payloads = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    weight[3, 3], weight[4, 3] = payloads
    found = np.asarray(on_device(weight).unpacked())
    assert (found[:, 0] == 0).all()
    assert (found[:32, 1] == 0).all()
    assert np.isnan(found[32:, 1]).all()
    assert np.isnan(found[:32, 2:]).all()


def products(pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Products of numbers with weights [out, in], quantised and multiplied in one program."""

    @jax.jit
    def program(pairs):
        return [kernels.matmul(x, quantised(weight)) for x, weight in pairs]

    return [np.asarray(found) for found in program(pairs)]


@needs_kernels
def test_the_product_is_that_of_integers(instructions):
    pairs = [drawn(rows, *shape) for rows in ROWS for shape in SHAPES]
    for (x, weight), found in zip(pairs, products(pairs), strict=True):
        expected, bound = integer_product(x, weight)
        assert found.shape == expected.shape
        assert (np.abs(found - expected) <= bound).all(), (x.shape, weight.shape)


@needs_kernels
def test_the_product_is_near_the_one_of_what_was_not_quantised(instructions):
    x, weight = drawn(5, 896, 300)
    found = np.asarray(jax.jit(partial(kernels.matmul))(x, on_device(weight)))
    x_step, step = (
        np.repeat(scales, 32, axis=1)
        for scales in (groups(x)[1][..., 0] / 127, weight_scales(weight)[..., 0])
    )
    # Each number is off by half a step, and by what both are together.
    bound = x_step / 2 @ np.abs(weight).T + (np.abs(x) + x_step / 2) @ step.T / 2
    assert (np.abs(found - x @ weight.T) <= 1.0001 * bound).all()


@needs_kernels
def test_an_element_has_the_same_bits_whatever_is_multiplied_beside_it(instructions):
    x, weight = drawn(40, 896, 200)
    places = [
        (rows, columns)
        for rows in (slice(0, 1), slice(3, 6), slice(7, 15), slice(30, 40))
        for columns in (slice(0, 32), slice(5, 70), slice(100, 152))
    ]
    whole, *parts = map(bits, products([(x, weight), *((x[r], weight[c]) for r, c in places)]))
    for place, part in zip(places, parts, strict=True):
        np.testing.assert_array_equal(part, whole[place])
    alone = jax.jit(partial(kernels.matmul, alone=True))(x, on_device(weight))
    np.testing.assert_array_equal(bits(alone), whole)


@needs_kernels
def test_a_number_that_is_not_finite_makes_its_row_nan_and_no_other(instructions):
    pairs = [drawn(7, 96, 40) for _ in range(3)]
    for (x, _), wild in zip(pairs, (np.inf, -np.inf, np.nan), strict=True):
        x[3, 50] = wild
    for found in products(pairs):
        assert np.isnan(found[3]).all()
        assert np.isfinite(np.delete(found, 3, axis=0)).all()


@needs_kernels
def test_tiny_numbers_and_zeros_do_not_become_anything_else(instructions):
    x = np.zeros((3, 64), np.float32)
    x[1], x[2] = 1e-40, 1e-20
    weight = np.ones((33, 64), np.float32)
    found = np.asarray(jax.jit(partial(kernels.matmul))(x, on_device(weight)))
    assert (found[:2] == 0).all()
    np.testing.assert_allclose(found[2], 64e-20, rtol=0.01)


def test_no_rows_and_no_columns_are_no_results():
    for rows, columns in ((0, 4), (3, 0)):
        weight = on_device(np.ones((columns, 32), np.float32))
        assert kernels.matmul(jnp.zeros((rows, 32)), weight).shape == (rows, columns)


def test_factors_that_do_not_fit_are_refused():
    weight = on_device(np.ones((4, 64), np.float32))
    with pytest.raises(TypeError, match=r"\(3, 32\) cannot be multiplied with \(64, 4\)"):
        kernels.matmul(jnp.zeros((3, 32)), weight)


def model_weights(config) -> tuple[dict, dict]:
    """Random weights, and what they stand for when quantised: all but the embedding table."""
    weights = reference.random_weights(config)
    rounded = {
        name: np.asarray(on_device(value).unpacked()).T if name.endswith(QUANTISED) else value
        for name, value in weights.items()
    }
    return weights, rounded


@pytest.mark.parametrize("mesh", ["1", "3", "data=2,model=4"])
def test_without_kernels_logits_are_those_of_the_weights_that_int8_stands_for(mesh, monkeypatch):
    monkeypatch.setattr(kernels, "instruction_set", lambda: None)
    # Groups of whole devices are those of one device.
    config = replace(SMALL_7B, intermediate_size=8 * 32, head_dim=32)
    weights, rounded = model_weights(config)
    tokens = random_tokens(config, 2, 9)
    model = MeshModel(config, mesh, weights=weights, quantization="int8")
    found = model.logits(tokens)[..., : config.vocab_size]
    expected = np.stack([reference.logits(rounded, config, list(row)) for row in tokens])
    if mesh == "3":  # There they are others.
        assert relative_error(found, expected) < 0.05
    else:
        assert relative_error(found, expected) < 2e-5


@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_without_kernels_one_weight_at_a_time_is_whole(numerics, monkeypatch):
    monkeypatch.setattr(kernels, "instruction_set", lambda: None)
    config = replace(SMALL_7B, num_hidden_layers=6, layer_types=())
    model = MeshModel(config, numerics=numerics, quantization="int8")
    memory = model.compiled(1, 16).memory_analysis()
    layer = sum(x.nbytes for x in jax.tree.leaves(model.params["model"]["layers"][0]))
    assert memory.temp_size_in_bytes < 4 * 2 * layer  # float32, and attention beside it.


@needs_kernels
@pytest.mark.parametrize(
    ("config", "mesh"),
    [(SMALL_7B, "3"), (SMALL_HALF_B, "data=2,model=4")],
    ids=["7B", "0.5B, tied"],
)
def test_fast_numerics_stays_near_what_is_not_quantised(config, mesh):
    tokens = random_tokens(config, 2, 9)
    found = MeshModel(config, mesh, quantization="int8").logits(tokens)
    whole = shared_model(config).logits(tokens)
    V = config.vocab_size
    assert relative_error(found[..., :V], whole[..., :V]) < 0.1


@pytest.mark.parametrize(
    ("config", "kind", "meshes"),
    [
        (SMALL_7B, bfloat16, ("1x32", "data=3,model=2")),
        (SMALL_HALF_B, np.float32, ("2x4",)),
    ],
    ids=["7B, bfloat16", "0.5B, tied, float32"],
)
def test_exact_numerics_has_the_same_bits_on_every_mesh(config, kind, meshes):
    config = replace(config, num_hidden_layers=1, layer_types=())
    tokens = random_tokens(config, 3, 9)
    found = [
        MeshModel(config, mesh, kind, numerics="exact", quantization="int8").logits(tokens)
        for mesh in ("1", *meshes)
    ]
    for logits in found[1:]:
        V = config.vocab_size
        np.testing.assert_array_equal(bits(logits[..., :V]), bits(found[0][..., :V]))
    whole = MeshModel(config, "1", kind).logits(tokens)
    assert relative_error(found[0][..., :V], whole[..., :V]) < 0.1


@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_only_what_is_multiplied_with_is_quantised(numerics):
    model = ParallelModel(SMALL_HALF_B, make_mesh("1x8"), jnp.dtype(bfloat16), numerics, "int8")
    params = dummy_params(model.weights)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="."): weight
        for path, weight in jax.tree_util.tree_leaves_with_path(
            params, is_leaf=lambda node: isinstance(node, Weight)
        )
    }
    assert set(found) == {weight.path for weight in model.weights.stored}
    for path, weight in found.items():
        packed = {isinstance(leaf, Packed) for leaf in weight.leaves}
        assert packed == {"_proj.weight" in path or "lm_head" in path}, path


def test_dummy_weights_are_the_same_on_every_mesh():
    config = replace(SMALL_7B, intermediate_size=32 * 32, head_dim=32)
    found = []
    for mesh in ("1", "1x8"):
        model = ParallelModel(config, make_mesh(mesh), jnp.dtype(np.float32), "fast", "int8")
        down = dummy_params(model.weights)["model"]["layers"][1]["mlp"]["down_proj"]
        found.append(np.asarray(down["weight"].leaf.values))
    np.testing.assert_array_equal(*found)


def test_an_unknown_quantization_is_named():
    with pytest.raises(MeshwenError, match="quantization must be int8, not 'int4'"):
        Qwen2ForCausalLM.from_pretrained("demo", quantization="int4")
    with pytest.raises(MeshwenError, match="quantization must be int8, not 'int4'"):
        ParallelModel(SMALL_7B, make_mesh("1"), jnp.dtype(np.float32), "fast", "int4")


def test_the_demo_model_solves_its_problem_from_the_command_line():
    asked = "Maya buys 4 books at $7 each and pays with $50. How much change does she get?"
    ran = CliRunner().invoke(
        app, ["generate", asked, "--quantization", "int8", "--temperature", "0"]
    )
    assert ran.exit_code == 0
    assert "22" in ran.stdout
    assert "in int8" in ran.stderr


@pytest.mark.real
def test_the_real_model_stays_near_float32(real_model_dir: Path, golden):
    cases = [case for case in golden["cases"] if len(case["input_ids"]) < 100][:6]

    def logprobs(**options) -> np.ndarray:
        model = Qwen2ForCausalLM.from_pretrained(real_model_dir, **options)
        rows = [model([[*case["input_ids"], *case["greedy"][:-1]]])[0] for case in cases]
        return np.concatenate([np.asarray(jax.nn.log_softmax(row)) for row in rows])

    whole = logprobs(dtype="float32")
    found = logprobs(dtype="bfloat16", quantization="int8")
    divergence = (np.exp(whole) * (whole - found)).sum(axis=1)
    assert divergence.mean() < 3e-3
    assert (whole.argmax(axis=1) == found.argmax(axis=1)).mean() > 0.95
