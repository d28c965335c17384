# SPDX-License-Identifier: Apache-2.0
"""The kernels for AVX512-BF16: right, and a product with the same bits whatever is beside it."""

import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from mesh_model import SMALL_7B, MeshModel, random_tokens
from meshwen import kernels
from meshwen.capacity import Capacity
from meshwen.engine import Engine
from meshwen.request import Request
from meshwen.sampling import SamplingParams

pytestmark = pytest.mark.skipif(
    not kernels.available(), reason="needs the extra cpu and a CPU with AVX512-BF16"
)

# Every tile, of 1 to 12 rows; one block of rows and several.
ROWS = [*range(1, 14), 24, 25, 37, 130]
# Contracted, columns: whole panels, overlapping ones, fewer columns than a tile, an odd sum.
SHAPES = [(2, 32), (64, 33), (896, 152), (152, 896), (77, 70), (64, 8), (1, 1), (608, 1152)]

product = jax.jit(kernels.product)


def operands(rows: int, contracted: int, columns: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(rows)
    a, b = rng.standard_normal((rows, contracted)), rng.standard_normal((contracted, columns))
    return jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_the_product_is_that_of_float64(rows, shape):
    a, b = operands(rows, *shape)
    found = np.asarray(product(a, b), np.float64)
    a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
    # Each addition rounds once; Higham's bound for a sum in one order.
    bound = shape[0] * 2.0**-24 * (np.abs(a64) @ np.abs(b64))
    assert (np.abs(found - a64 @ b64) <= bound).all()


def test_an_element_has_the_same_bits_whatever_is_multiplied_beside_it():
    a, b = operands(130, 896, 608)
    whole = np.asarray(product(a, b)).view(np.int32)
    for rows in (slice(0, 1), slice(3, 6), slice(7, 15), slice(100, 130)):
        for columns in (slice(0, 32), slice(5, 70), slice(100, 252), slice(0, 608)):
            part = np.asarray(product(a[rows], b[:, columns])).view(np.int32)
            np.testing.assert_array_equal(part, whole[rows, columns])


def test_zeros_behind_a_sum_change_no_bit():
    a, b = operands(9, 100, 64)
    longer = product(jnp.pad(a, ((0, 0), (0, 28))), jnp.pad(b, ((0, 28), (0, 0))))
    np.testing.assert_array_equal(
        np.asarray(longer).view(np.int32), np.asarray(product(a, b)).view(np.int32)
    )


def test_nan_and_infinity_come_through():
    a, b = jnp.ones((2, 4), jnp.bfloat16), jnp.ones((4, 32), jnp.bfloat16)
    y = np.asarray(product(a.at[0, 1].set(jnp.nan), b.at[0, 3].set(jnp.inf)))
    assert np.isnan(y[0]).all()
    assert y[1, 3] == np.inf
    assert (np.delete(y[1], 3) == 4).all()


def test_devices_may_multiply_at_the_same_time():
    a, b = operands(8, 256, 320)
    devices = jax.devices()[:8]
    expected = np.asarray(product(a, b))
    placed = [tuple(jax.device_put(x, device) for x in (a, b)) for device in devices]
    for _ in range(20):
        for found in [product(*pair) for pair in placed]:
            np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.parametrize(
    ("K", "G", "H"), [(2, 7, 64), (4, 7, 128), (1, 1, 16), (8, 5, 32), (1, 8, 48)]
)
@pytest.mark.parametrize("S", [16, 96])
def test_attention_is_that_of_float64_over_the_slots_that_are_seen(K, G, H, S):
    rng = np.random.default_rng(0)
    B = 5
    q = (rng.standard_normal((B, K * G, 1, H)) * H**-0.5).astype(np.float32)
    keys = rng.standard_normal((B, K, H, S)).astype(np.float32)
    values = jnp.asarray(rng.standard_normal((B, K, S, H)), jnp.bfloat16)
    first, last = np.array([0, 0, 3, S - 1, 0], np.int32), np.array([0, S - 1, 9, S - 1, S // 2])
    unseen = np.ones((B, S), bool)
    for row in range(B):
        unseen[row, first[row] : last[row] + 1] = False
    keys[np.broadcast_to(unseen[:, None, None], keys.shape)] = np.nan
    values = jnp.where(unseen[:, None, :, None], jnp.nan, values)
    found = np.asarray(jax.jit(kernels.attention)(q, keys, values, first, last.astype(np.int32)))
    scores = np.einsum("bkgh,bkhs->bkgs", q.reshape(B, K, G, H).astype(np.float64), keys)
    scores = np.where(unseen[:, None, None], -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    values = np.where(unseen[:, None, :, None], 0, np.asarray(values, np.float64))
    expected = np.einsum("bkgs,bksh->bkgh", weights, values).reshape(B, K * G, 1, H)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["q", "keys", "values"])
def test_attention_hides_no_number_that_is_not_finite(where, bad):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 2, 1, 16)), jnp.float32)
    keys = jnp.asarray(rng.standard_normal((2, 1, 16, 16)), jnp.float32)
    values = jnp.asarray(rng.standard_normal((2, 1, 16, 16)), jnp.bfloat16)
    place = {"q": (0, 1, 0, 3), "keys": (0, 0, 3, 4), "values": (0, 0, 4, 3)}[where]
    arrays = {"q": q, "keys": keys, "values": values}
    arrays[where] = arrays[where].at[place].set(bad)
    if where == "keys":  # Where the query is not 0, and the score infinite in the right direction.
        arrays["q"] = arrays["q"].at[0, 1, 0, 3].set(1)
    last = jnp.array([9, 9], jnp.int32)
    found = np.asarray(jax.jit(kernels.attention)(*arrays.values(), last * 0, last))
    assert not np.isfinite(found[0, 1]).all()
    assert np.isfinite(found[1]).all()


@pytest.mark.parametrize("last", [-5, 10**6])
def test_slots_outside_of_the_cache_are_clipped(last):
    q, keys = jnp.ones((1, 1, 1, 16)), jnp.ones((1, 1, 16, 16))
    values = jnp.arange(16, dtype=jnp.bfloat16)[None, None, :, None] * jnp.ones(16, jnp.bfloat16)
    one = jnp.array([last], jnp.int32)
    found = np.asarray(jax.jit(kernels.attention)(q, keys, values, jnp.zeros_like(one), one))
    np.testing.assert_allclose(found, 0 if last < 0 else 7.5)


def test_what_is_not_bfloat16_is_refused():
    with pytest.raises(TypeError, match="float32"):
        kernels.product(jnp.ones((2, 2)), jnp.ones((2, 2), jnp.bfloat16))


def test_threads_may_begin_at_the_same_time():
    # In a process of its own, where nothing is compiled yet.
    program = """
import concurrent.futures as f, jax.numpy as jnp
from meshwen import kernels
one = jnp.ones((4, 4), jnp.bfloat16)
with f.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda _: float(kernels.product(one, one)[0, 0]), range(8)))
assert found == [4.0] * 8
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_an_llvmlite_that_cannot_compile_them_is_told_of_and_not_used(monkeypatch, caplog):
    def old(*_):
        raise RuntimeError("LLVM IR parsing error\n<string>:6:30: error: expected type")

    compiled = kernels._machine_code()  # To be kept: the other tests run it.
    monkeypatch.setattr("meshwen.kernels._compiled", old)
    kernels._machine_code.cache_clear()
    try:
        assert not kernels.available()
        assert "LLVM IR parsing error" in caplog.text
        assert "meshwen[cpu]" in caplog.text
    finally:
        monkeypatch.setattr("meshwen.kernels._compiled", lambda: compiled)
        kernels._machine_code.cache_clear()
        assert kernels.available()


def test_attention_of_large_scores_neither_overflows_nor_loses_the_largest():
    q = jnp.full((1, 1, 1, 16), 100.0)
    keys = jnp.asarray(np.linspace(-10, 10, 32), jnp.float32) * jnp.ones((1, 1, 16, 1))
    values = jnp.arange(32, dtype=jnp.bfloat16)[None, None, :, None] * jnp.ones((16,), jnp.bfloat16)
    last = jnp.array([31], jnp.int32)
    found = jax.jit(kernels.attention)(q, keys, values, last * 0, last)
    np.testing.assert_array_equal(np.asarray(found), 31)


SLIDING = replace(
    SMALL_7B,
    head_dim=16,
    num_hidden_layers=3,
    sliding_window=5,
    layer_types=("full_attention", "sliding_attention", "full_attention"),
)


@pytest.mark.parametrize("mesh", ["1", "1x8", "data=2,model=2"])
def test_a_model_decodes_with_the_kernel_what_it_reads_at_once(mesh):
    model = MeshModel(SLIDING, mesh, jnp.bfloat16)
    token_ids = random_tokens(SLIDING, 2, 20, seed=3)
    expected = model.logits(token_ids)
    cache = model.cache(2, 32)
    _, cache = model.step(token_ids[:, :12], [0, 0], cache)
    found = []
    for position in range(12, 20):
        logits, cache = model.step(token_ids[:, position : position + 1], [position] * 2, cache)
        found.append(logits[:, 0])
    assert "meshwen_avx512_bf16_attention" in model.compiled(2, 1, 32).as_text()
    difference = np.stack(found, axis=1) - expected[:, 12:]
    # Weights of attention are rounded to bfloat16 where all are read at once, and not here.
    assert np.abs(difference).max() < 0.02 * np.abs(expected).max()


def test_the_engine_draws_what_is_likeliest_where_all_is_read_at_once():
    weights = reference.random_weights(SLIDING)
    rows = zip(random_tokens(SLIDING, 4, 20), (3, 20, 9, 14), strict=True)
    prompts = [row[:length].tolist() for row, length in rows]
    sampling = SamplingParams(max_new_tokens=12, temperature=0)
    requests = [Request(tuple(prompt), sampling) for prompt in prompts]
    model = MeshModel(SLIDING, "1", jnp.bfloat16, weights)
    runner = model.runner
    engine = Engine(runner, None, [], Capacity.of(runner.plan, runner.dtype, 3, 40))
    answers = {e.request: e.completion.tokens for e in engine.run(requests) if e.completion}
    for number, prompt in enumerate(prompts):
        whole = np.array([[*prompt, *answers[number]]])
        logits = model.logits(np.pad(whole, ((0, 0), (0, 40 - whole.shape[1]))))[0]
        for place, token in enumerate(answers[number], start=len(prompt) - 1):
            shortfall = logits[place].max() - logits[place, token]
            assert shortfall <= 0.02 * np.abs(logits).max()
