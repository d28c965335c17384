# SPDX-License-Identifier: Apache-2.0
"""Exact numerics: the same bits on every mesh, in every batch, however a prompt is read."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from mesh_model import (
    SMALL_7B,
    SMALL_HALF_B,
    MeshModel,
    count_collectives,
    padded_rows,
    random_tokens,
    shared_model,
)
from meshwen.errors import MeshwenError
from meshwen.models.parallel_model import ParallelModel
from meshwen.ops.attention import weighted_values
from meshwen.ops.cache_layout import CacheLayout
from meshwen.ops.cpu.xla import XlaOnCpu
from meshwen.ops.numerics.exact import Exact
from meshwen.ops.operations import Ops
from meshwen.ops.weight import Weight
from meshwen.parallel.heads import PADDING, subtree_head_layout
from meshwen.parallel.mesh import make_mesh
from meshwen.parallel.plan import ParallelPlan
from meshwen.runtime import jax_versions
from needs_kernels import needs_ynnpack

BATCH, LENGTH, SLOTS = 4, 16, 32
# One layer: whole models are `test_exact_models.py`'s and the engine's.
HEADS_28 = replace(SMALL_7B, num_hidden_layers=1, layer_types=())
HEADS_14 = replace(SMALL_HALF_B, num_hidden_layers=1, layer_types=())
DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16}

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_dtype_of_xla = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(np.float32, id="float32"),
        pytest.param(jnp.bfloat16, id="bfloat16", marks=needs_ynnpack),
    ],
)
# Each mesh once, with one dtype and one head count.
every_layout = pytest.mark.parametrize(
    ("config", "dtype", "mesh"),
    [
        pytest.param(config, DTYPES[dtype], mesh, id=f"{heads} heads, {dtype}, {mesh}")
        for heads, config, dtype, meshes in (
            (28, HEADS_28, "float32", ("2", "8x4")),
            (28, HEADS_28, "bfloat16", ("1x8", "16", "data=2,model=4")),
            (14, HEADS_14, "float32", ("4x2", "1x32")),
            (14, HEADS_14, "bfloat16", ("4", "2x4")),
        )
        for mesh in meshes
    ],
)


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))


def exact(config, mesh="1", dtype=np.float32) -> MeshModel:
    return shared_model(config, mesh, dtype, "exact")


OPTIONS = XlaOnCpu().compiler_options(ordered=True)


def forward(config, mesh="1", dtype=np.float32) -> np.ndarray:
    return exact(config, mesh, dtype).logits(random_tokens(config, BATCH, LENGTH))


@every_dtype
def test_the_heads_of_a_device_are_summed_as_each_is_by_itself(dtype):
    """Values fresh from a projection, of width enough that no padding copies them."""
    B, K, R, T, H = 2, 4, 21, 24, 128
    rng = np.random.default_rng(0)
    weights = jnp.asarray(np.exp(4 * rng.normal(size=(B, K, R, T))), jnp.float32)
    projected = jnp.asarray(rng.normal(size=(B, T, K * H)), dtype)

    def summed(weights, projected):
        v = projected.reshape(B, T, -1, H).swapaxes(1, 2)
        return weighted_values(weights, v, CacheLayout("BKSH", "BKSH"), XlaOnCpu())

    run = jax.jit(summed, compiler_options=OPTIONS)
    whole = [np.asarray(part) for part in run(weights, projected)]
    for head in range(K):
        one = run(weights[:, head : head + 1], projected[..., head * H : (head + 1) * H])
        for found, expected in zip(one, whole, strict=True):
            assert_same_bits(np.asarray(found), expected[:, head : head + 1])


@every_layout
def test_logits_have_the_bits_of_one_device(config, dtype, mesh):
    assert_same_bits(forward(config, mesh, dtype), forward(config, "1", dtype))


@pytest.mark.parametrize(
    ("config", "dtype", "mesh"),
    [
        (HEADS_28, np.float32, "8x4"),
        (HEADS_28, jnp.bfloat16, "data=2,model=4"),
        (HEADS_14, jnp.bfloat16, "1"),
    ],
    ids=["28 heads, float32, 8x4", "28 heads, bfloat16, data=2,model=4", "14 heads, bfloat16, 1"],
)
def test_a_prompt_read_in_chunks_or_token_by_token_gives_the_same_bits(config, dtype, mesh):
    model, token_ids = exact(config, mesh, dtype), random_tokens(config, BATCH, LENGTH)
    for chunk in (8, 1):
        cache, found = model.cache(BATCH, SLOTS), []
        for start in range(0, LENGTH, chunk):
            part = token_ids[:, start : start + chunk]
            out, cache = model.step(part, [start] * BATCH, cache)
            found.append(out)
        assert_same_bits(np.concatenate(found, axis=1), forward(config, "1", dtype))


@every_dtype_of_xla
def test_bits_are_the_same_on_every_mesh_without_the_kernels_too(dtype, monkeypatch):
    monkeypatch.setattr("meshwen.ops.cpu.kernels.instruction_set", lambda: None)
    token_ids, V = random_tokens(HEADS_28, BATCH, LENGTH), HEADS_28.vocab_size
    one, eight = (MeshModel(HEADS_28, mesh, dtype, numerics="exact") for mesh in ("1", "1x8"))
    expected = one.logits(token_ids)[..., :V]
    assert_same_bits(eight.logits(token_ids)[..., :V], expected)
    assert_same_bits(eight.logits(token_ids[1:2])[..., :V], expected[1:2])


@every_dtype
def test_a_sequence_does_not_depend_on_its_batch_row_or_padding(dtype):
    config = HEADS_28
    model, token_ids = exact(config, "1x8", dtype), random_tokens(config, BATCH, LENGTH)
    expected = forward(config, "1", dtype)
    assert_same_bits(model.logits(token_ids[2:3]), expected[2:3])
    assert_same_bits(model.logits(token_ids[::-1][:3]), expected[::-1][:3])
    padded = np.pad(padded_rows([3, 16, 9, 1], token_ids), ((0, 0), (0, 8)), constant_values=1)
    found = model.logits(padded)
    for row, length in enumerate([3, 16, 9, 1]):
        assert_same_bits(found[row, :length], expected[row, :length])


@every_dtype
def test_a_longer_cache_changes_nothing(dtype):
    model, token_ids = exact(HEADS_28, "1x8", dtype), random_tokens(HEADS_28, 2, LENGTH)
    found = [model.step(token_ids, [0, 0], model.cache(2, slots))[0] for slots in (16, 200)]
    assert_same_bits(found[1], found[0])


def test_one_step_of_any_batch_has_the_bits_of_the_whole():
    token_ids = random_tokens(HEADS_28, 13, 1)
    whole = exact(HEADS_28, "1", jnp.bfloat16).logits(token_ids)
    for batch in (1, 5):
        found = exact(HEADS_28, "8x4", jnp.bfloat16).logits(token_ids[:batch])
        assert_same_bits(found, whole[:batch])


def column(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x @ weight, as a column-parallel layer multiplies, without kernels."""
    ops = Ops(numerics=Exact(), backend=XlaOnCpu())
    return ops.column(x, {"weight": Weight((weight,), inputs_first=True)})


@every_dtype_of_xla
@pytest.mark.parametrize(("inner", "columns"), [(128, 512), (128, 4096), (448, 18944), (896, 4864)])
def test_a_product_has_one_order_for_any_number_of_rows_and_columns(dtype, inner, columns):
    # Among them shapes where Eigen shares longer sums among threads: few rows and many columns.
    rng = np.random.default_rng(0)
    x = rng.standard_normal((512, inner)).astype(np.float32)
    weight = rng.standard_normal((inner, columns)).astype(dtype)

    @partial(jax.jit, compiler_options=OPTIONS)
    def products(operands):
        return [column(*pair) for pair in operands]

    rows = (1, 2, 3, 4, 5, 7, 8, 13, 20, 24, 48, 130)
    some = (columns // 2, columns // 4, columns // 8, 152, 19)
    operands = [(x, weight), *((x[:n], weight) for n in rows)]
    operands += [(x[:40], np.ascontiguousarray(weight[:, :n])) for n in some]
    expected, *found = map(np.asarray, products(operands))
    for n, part in zip(rows, found, strict=False):
        assert_same_bits(part, expected[:n])
    for n, part in zip(some, found[len(rows) :], strict=True):
        assert_same_bits(part, expected[:40, :n])


@pytest.mark.parametrize(
    "function", [jnp.exp, jax.nn.silu, jnp.log, jnp.cos], ids=lambda f: f.__name__
)
def test_a_function_has_one_approximation_for_any_width_and_surroundings(function):
    pointwise = Exact().pointwise
    x = np.random.default_rng(0).uniform(0, 20, (2048, 15)).astype(np.float32)
    lowered = jax.jit(
        lambda x: pointwise(function, x - x.min(axis=1, keepdims=True)),
        compiler_options=OPTIONS,
    )
    expected = np.asarray(jax.jit(function)((x - x.min(axis=1, keepdims=True)).reshape(-1, 64)))
    assert_same_bits(np.asarray(lowered(x)), expected.reshape(x.shape))
    assert_same_bits(np.asarray(lowered(x[:1])), expected.reshape(x.shape)[:1])


def test_the_inverse_square_root_is_a_root_and_a_quotient_each_rounded_once():
    """IEEE 754 leaves no choice there; a processor's own approximation has other bits."""
    x = np.random.default_rng(0).uniform(1e-6, 20, 4095).astype(np.float32)
    run = jax.jit(Exact().inverse_sqrt, compiler_options=OPTIONS)
    assert_same_bits(np.asarray(run(x)), 1 / np.sqrt(x))


def test_a_product_is_rounded_before_it_is_added():
    a, b, c = np.random.default_rng(0).uniform(1, 2, (3, 4096)).astype(np.float32)

    @partial(jax.jit, compiler_options=OPTIONS)
    def added(a, b, c):
        (product,) = Exact().rounded((a * b,))
        return product + c

    assert_same_bits(np.asarray(added(a, b, c)), a * b + c)


@every_dtype
def test_no_sum_is_a_negative_zero(dtype):
    x, weight = -np.ones((4, 1), np.float32), np.zeros((1, 64), dtype)
    found = jax.jit(column, compiler_options=OPTIONS)(x, weight)
    assert not np.signbit(np.asarray(found)).any()


def wild_weights(seed: int) -> dict[str, np.ndarray]:
    """Wide exponents, cancelling sums, denormals and signed zeros."""
    rng = np.random.default_rng(seed)
    weights = reference.random_weights(HEADS_28)
    for name, array in weights.items():
        wild = array * np.exp2(rng.integers(-12, 6, array.shape))
        if array.ndim == 2:
            wild[:, 1::2] = np.where(
                rng.random(wild[:, 1::2].shape) < 0.3, -wild[:, ::2], wild[:, 1::2]
            )
            wild[rng.random(array.shape) < 0.05] = -0.0
            wild[rng.random(array.shape) < 0.05] = 1e-41
        weights[name] = wild.astype(np.float32)
    weights["model.embed_tokens.weight"][5] = -0.0
    weights["model.layers.0.mlp.down_proj.weight"][7] = 0
    return weights


@every_dtype
def test_wild_numbers_keep_their_bits(dtype):
    meshes = ("1", "1x8", "8x4")
    programs = {mesh: exact(HEADS_28, mesh, dtype) for mesh in meshes}
    for seed in range(3):
        weights = wild_weights(seed)
        token_ids = random_tokens(HEADS_28, BATCH, LENGTH, seed)
        token_ids[:, 3] = 5
        params = {m: MeshModel(HEADS_28, m, dtype, weights, "exact").params for m in meshes}
        expected = programs["1"].logits(token_ids, params["1"])
        assert np.isfinite(expected).all()
        for mesh in ("1x8", "8x4"):
            assert_same_bits(programs[mesh].logits(token_ids, params[mesh]), expected)
        one = programs["1x8"].logits(token_ids[1:2], params["1x8"])
        assert_same_bits(one, expected[1:2])


def test_the_error_is_no_larger_than_that_of_fast_numerics():
    # At the real width: fast numerics adds up sums of 256 there, exact numerics of 64.
    config = replace(HEADS_14, hidden_size=896, intermediate_size=4864, head_dim=64)
    weights, token_ids = reference.random_weights(config), random_tokens(config, 2, LENGTH)
    expected = np.stack([reference.logits(weights, config, row.tolist()) for row in token_ids])
    fast, exact = (
        MeshModel(config, "1", np.float32, weights, numerics).logits(token_ids)
        for numerics in ("fast", "exact")
    )
    errors = [
        np.sqrt(np.square(found[..., : config.vocab_size] - expected).mean())
        for found in (fast, exact)
    ]
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("mesh", ["2", "8x4"])
def test_sums_cross_devices_by_all_to_all_and_all_gather(mesh):
    model = exact(HEADS_28, mesh)
    sums = 2 * HEADS_28.num_hidden_layers
    hlo = model.compiled(BATCH, LENGTH).as_text()
    # The one all-reduce adds the bits of embeddings, as integers.
    assert count_collectives(hlo) == {"all-reduce": 1, "all-to-all": sums, "all-gather": sums}
    assert not [line for line in hlo.splitlines() if " all-reduce(" in line and "= f32" in line]


def test_fast_numerics_does_differ_between_meshes():
    found = [shared_model(HEADS_28, m).logits(random_tokens(HEADS_28, BATCH, LENGTH)) for m in "18"]
    vocab = HEADS_28.vocab_size
    assert (found[0][..., :vocab] != found[1][..., :vocab]).any()


@pytest.mark.parametrize(("query", "key_value"), [(14, 2), (12, 2), (28, 4), (40, 8), (64, 8)])
@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16, 32])
def test_pieces_of_heads_are_subtrees_of_one_tree(query, key_value, devices):
    layout = subtree_head_layout(query, key_value, devices)
    group = query // key_value
    whole = 1 << (group - 1).bit_length()
    slots = layout.device_query_heads().reshape(-1, layout.group_size)
    assert sorted(slots[slots != PADDING]) == list(range(query))
    piece = max(1, whole * key_value // max(devices, key_value))
    for first in slots[slots[:, 0] != PADDING, 0]:
        assert first % group % piece == 0


@pytest.mark.parametrize("version", ["0.7.1", "0.8.0"])
def test_bfloat16_without_the_kernels_is_refused_where_xla_has_no_one_order(version, monkeypatch):
    monkeypatch.setattr(jax_versions.metadata, "version", lambda package: version)
    model = partial(ParallelModel, HEADS_28, make_mesh("1"), kernels=False)
    model(jnp.bfloat16)
    model(jnp.float32, numerics="exact")
    with pytest.raises(MeshwenError, match=rf"need the kernels or jax 0\.8\.1, not {version}"):
        model(jnp.bfloat16, numerics="exact")


def test_what_exact_numerics_cannot_do_is_refused():
    with pytest.raises(MeshwenError, match="1, 2, 4, 8, 16 or 32 devices, not 3"):
        ParallelPlan(HEADS_28.sizes, make_mesh("3"), leaves=32)
    odd = replace(HEADS_28, num_attention_heads=27, num_key_value_heads=3)
    with pytest.raises(MeshwenError, match="power of two of key/value heads, not 3"):
        ParallelPlan(odd.sizes, make_mesh("2"), leaves=32)
