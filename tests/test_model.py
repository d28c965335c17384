# SPDX-License-Identifier: Apache-2.0
"""The forward pass on one device, against float64 numpy, transformers, and itself with a cache."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from mesh_model import (
    SMALL_7B,
    SMALL_HALF_B,
    MeshModel,
    padded_rows,
    random_tokens,
    relative_error,
    shared_model,
)
from meshwen.models.qwen2 import Qwen2Config
from meshwen.models.rope_scaling import RopeScaling
from meshwen.ops.cpu import kernels
from meshwen.ops.cpu.xla import XlaOnCpu
from meshwen.ops.dot import dot
from meshwen.ops.operations import Ops
from meshwen.ops.rotary import Rotary, rotate
from meshwen.ops.weight import Weight

# In units of the largest logit. float32 rounding gives 1e-6; a wrong model gives 1e-2 or more.
TOLERANCE = 1e-5
SLOTS, LENGTH = 16, 12

TINY = replace(
    SMALL_7B,
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    layer_types=(),
    num_attention_heads=4,
    num_key_value_heads=2,
)
YARN = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0)
CONFIGS = {
    "7b heads": SMALL_7B,
    "0.5b heads, tied": SMALL_HALF_B,
    "one kv head": replace(TINY, num_key_value_heads=1),
    "as many kv heads": replace(TINY, num_key_value_heads=4, rms_norm_eps=1e-2),
    "wide heads": replace(TINY, head_dim=20, rope_theta=1e6),
    "yarn": replace(TINY, rope_scaling=YARN, head_dim=16),
    "linear": replace(TINY, rope_scaling=RopeScaling(rope_type="linear", factor=2.0)),
    "sliding": replace(
        TINY,
        layer_types=("full_attention", "sliding_attention", "sliding_attention"),
        sliding_window=4,
        tie_word_embeddings=True,
    ),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
some_configs = pytest.mark.parametrize("name", ["7b heads", "sliding", "yarn"])


@functools.cache
def expected_logits(config: Qwen2Config, batch: int = 3) -> np.ndarray:
    """The reference's logits of the sequences that most tests use: float64 [B, LENGTH, V]."""
    weights = reference.random_weights(config)
    rows = random_tokens(config, batch, LENGTH)
    return np.stack([reference.logits(weights, config, row.tolist()) for row in rows])


@every_config
def test_logits_are_those_of_the_float64_reference(config):
    found = shared_model(config).logits(random_tokens(config, 3, LENGTH))
    assert found.dtype == np.float32
    assert relative_error(found, expected_logits(config)) < TOLERANCE


@pytest.mark.parametrize("name", ["sliding", "0.5b heads, tied"])
def test_without_kernels_logits_and_steps_are_those_of_the_float64_reference(name, monkeypatch):
    monkeypatch.setattr(kernels, "instruction_set", lambda: None)
    config = CONFIGS[name]
    model, token_ids = MeshModel(config), random_tokens(config, 3, LENGTH)
    assert relative_error(model.logits(token_ids), expected_logits(config)) < TOLERANCE
    cache, found = model.cache(3, SLOTS), []
    for t in range(LENGTH):
        out, cache = model.step(token_ids[:, t : t + 1], [t] * 3, cache)
        found.append(out)
    assert relative_error(np.concatenate(found, 1), expected_logits(config)) < TOLERANCE


@pytest.mark.torch
@every_config
def test_logits_are_those_of_transformers(config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2ForCausalLM(transformers_config(transformers, config)).eval()
    weights = reference.random_weights(config)
    tensors = {key: torch.from_numpy(value) for key, value in weights.items()}
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"} == {"lm_head.weight"}
    assert not unexpected
    if config.tie_word_embeddings:
        theirs.tie_weights()
    token_ids = random_tokens(config, 3, 40, seed=1)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(token_ids.astype(np.int64))).logits.numpy()
    assert relative_error(shared_model(config).logits(token_ids), expected) < TOLERANCE


def transformers_config(transformers, config: Qwen2Config):
    """transformers' own config of the same model; ours is read back from it, as a check."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling := config.rope_scaling:
        rope |= {"rope_type": scaling.rope_type, "factor": scaling.factor}
        if scaling.rope_type == "yarn":
            rope["original_max_position_embeddings"] = scaling.original_max_position_embeddings
            rope["beta_fast"] = scaling.beta_fast
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    names += ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "sliding_window")
    names += ("max_position_embeddings", "tie_word_embeddings")
    theirs = transformers.Qwen2Config(
        **{name: getattr(config, name) for name in names},
        use_sliding_window=config.sliding_window is not None,
        layer_types=list(config.layer_types),
        rope_parameters=rope,
        attn_implementation="eager",
        architectures=["Qwen2ForCausalLM"],
    )
    ours = Qwen2Config.from_dict(theirs.to_dict())
    same = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype")
    assert replace(ours, **{name: getattr(config, name) for name in same}) == config
    return theirs


@some_configs
def test_decoding_token_by_token_equals_one_forward_pass(name):
    config = CONFIGS[name]
    model, token_ids = shared_model(config), random_tokens(config, 3, LENGTH)
    cache, found = model.cache(3, SLOTS), []
    for t in range(LENGTH):
        out, cache = model.step(token_ids[:, t : t + 1], [t] * 3, cache)
        found.append(out)
    assert relative_error(np.concatenate(found, 1), expected_logits(config)) < TOLERANCE


@some_configs
@pytest.mark.parametrize("chunk", [4, 8])
def test_prefill_in_chunks_equals_one_forward_pass(name, chunk):
    config = CONFIGS[name]
    model, token_ids = shared_model(config), random_tokens(config, 3, LENGTH)
    cache, found = model.cache(3, SLOTS), []
    # The last chunk starts earlier where it would run out of tokens: it then repeats some.
    for start in range(0, LENGTH, chunk):
        start = min(start, LENGTH - chunk)
        out, cache = model.step(token_ids[:, start : start + chunk], [start] * 3, cache)
        assert relative_error(out, expected_logits(config)[:, start : start + chunk]) < TOLERANCE
        found.append(start)
    assert found[-1] == LENGTH - chunk


@some_configs
def test_a_batch_of_mixed_lengths_decodes_each_row_as_if_it_were_alone(name):
    config = CONFIGS[name]
    model, expected = shared_model(config), expected_logits(config)
    token_ids, lengths = random_tokens(config, 3, LENGTH), np.array([2, 8, 5])
    out, cache = model.step(padded_rows(lengths, token_ids)[:, :8], [0] * 3, model.cache(3, SLOTS))
    for row, length in enumerate(lengths):
        assert relative_error(out[row, :length], expected[row, :length]) < TOLERANCE
    for _ in range(4):  # One new token a row, each at its own position.
        tokens = token_ids[range(3), lengths]
        out, cache = model.step(tokens[:, None], lengths, cache)
        assert relative_error(out[:, 0], expected[range(3), lengths]) < TOLERANCE
        lengths = lengths + 1


@some_configs
def test_several_tokens_a_row_from_mixed_starts(name):
    config = CONFIGS[name]
    model, expected = shared_model(config), expected_logits(config)
    token_ids, starts = random_tokens(config, 3, LENGTH), np.array([2, 8, 5])
    _, cache = model.step(padded_rows(starts, token_ids)[:, :8], [0] * 3, model.cache(3, SLOTS))
    where = starts[:, None] + np.arange(4)
    rows = np.arange(3)[:, None]
    out, _ = model.step(token_ids[rows, where], starts, cache)
    assert relative_error(out, expected[rows, where]) < TOLERANCE


def test_what_an_earlier_sequence_left_in_the_cache_is_not_seen():
    model, token_ids = shared_model(SMALL_7B), random_tokens(SMALL_7B, 3, LENGTH)
    fresh, _ = model.step(token_ids[:, :4], [0] * 3, model.cache(3, SLOTS))
    used = jax.tree.map(lambda x: jnp.full_like(x, 1e4), model.cache(3, SLOTS))
    again, _ = model.step(token_ids[:, :4], [0] * 3, used)
    np.testing.assert_array_equal(again, fresh)


def test_attention_reads_nothing_that_was_not_written():
    model, token_ids = shared_model(SMALL_7B), random_tokens(SMALL_7B, 3, LENGTH)
    nowhere = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), model.cache(3, SLOTS))
    found, _ = model.step(token_ids, [0] * 3, nowhere)
    assert relative_error(found, expected_logits(SMALL_7B)) < TOLERANCE


def test_padding_behind_a_sequence_is_not_seen():
    model, lengths = shared_model(SMALL_7B), [12, 7, 1]
    found = model.logits(padded_rows(lengths, random_tokens(SMALL_7B, 3, LENGTH)))
    assert np.isfinite(found).all()
    for row, length in enumerate(lengths):
        expected = expected_logits(SMALL_7B)[row, :length]
        assert relative_error(found[row, :length], expected) < TOLERANCE


def test_a_sequence_does_not_depend_on_its_neighbours():
    model, token_ids = shared_model(SMALL_7B), random_tokens(SMALL_7B, 3, LENGTH)
    others = token_ids.copy()
    others[1:] = random_tokens(SMALL_7B, 2, LENGTH, seed=9)
    np.testing.assert_array_equal(model.logits(others)[0], model.logits(token_ids)[0])


def bfloat16_model() -> MeshModel:
    return MeshModel(SMALL_7B, dtype=jnp.bfloat16)


def test_bfloat16_stays_near_float32_and_decodes_as_it_prefills():
    model, token_ids = bfloat16_model(), random_tokens(SMALL_7B, 3, LENGTH)
    exact = expected_logits(SMALL_7B)
    whole = model.logits(token_ids)
    assert whole.dtype == np.float32
    assert relative_error(whole, exact) < 0.03  # A bfloat16 has 8 bits: 0.004 a rounding.
    cache, found = model.cache(3, SLOTS), []
    for t in range(LENGTH):
        out, cache = model.step(token_ids[:, t : t + 1], [t] * 3, cache)
        found.append(out)
    assert cache[0].keys.dtype.itemsize == cache[0].values.dtype.itemsize == 2
    assert relative_error(np.concatenate(found, 1), exact) < 0.03
    assert relative_error(np.concatenate(found, 1), whole) < 0.02


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 8, 9])
def test_padding_the_rows_of_a_matmul_does_not_change_them(rows, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, rows, 32)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((32, 24)), dtype)
    bias = jnp.asarray(rng.standard_normal(24), dtype)
    x64 = np.asarray(x.astype(dtype), np.float64)
    y64 = x64 @ np.asarray(weight, np.float64)
    for min_rows in (1, 8):
        ops = Ops(backend=XlaOnCpu(min_rows))
        kernel = {"weight": Weight((weight,), inputs_first=True)}
        found = ops.column(x, kernel | {"bias": Weight((bias,), inputs_first=False)})
        assert (found.shape, found.dtype) == ((1, rows, 24), jnp.float32)
        assert relative_error(np.asarray(found), y64 + np.asarray(bias, np.float64)) < 1e-6
        assert relative_error(np.asarray(ops.row(x, kernel)), y64) < 1e-6
        tied = {"weight": Weight((weight.T,), inputs_first=False)}
        assert relative_error(np.asarray(ops.logits(x, tied)), y64) < 1e-6


def test_float32_products_ask_every_back_end_for_float32():
    def precision(dtype) -> str:
        a = jnp.ones((2, 2), dtype)
        return str(jax.make_jaxpr(lambda a: dot(a, a, (((1,), (0,)), ((), ()))))(a))

    assert "HIGHEST" in precision(jnp.float32)
    assert "HIGHEST" not in precision(jnp.bfloat16)
    assert "preferred_element_type=float32" in precision(jnp.bfloat16)


def test_rms_norm_of_large_and_tiny_rows():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 16)) * np.array([[1e-6], [1e-2], [1.0], [1e4]])
    weight = rng.standard_normal(16).astype(np.float32)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight
    layer = {"weight": Weight((jnp.asarray(weight),), inputs_first=False)}
    found = Ops().rms_norm(jnp.asarray(x, jnp.float32), layer, 1e-6)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_rotation_pairs_each_dimension_with_that_half_a_head_away():
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    quarter_turn = Rotary(jnp.asarray([0.0, 1.0]), jnp.asarray([1.0, 0.0]))
    assert rotate(x, quarter_turn, Ops()).reshape(-1).tolist() == [-3.0, 2.0, 1.0, 4.0]


def test_large_key_biases_do_not_drown_bfloat16_keys():
    """Biases as Qwen2.5 has them: a norm of hundreds, in the slowest rotary pairs."""
    config = replace(SMALL_7B, rope_theta=1e6, head_dim=32, max_position_embeddings=4096)
    weights = reference.random_weights(config)
    for name, bias in weights.items():
        if name.endswith("k_proj.bias"):
            heads = np.zeros((config.num_key_value_heads, 2, 16), np.float32)
            heads[..., 12:] = np.random.default_rng(0).standard_normal((*heads.shape[:2], 4)) * 60
            weights[name] = heads.reshape(bias.shape)
    token_ids = random_tokens(config, 2, LENGTH)
    expected = MeshModel(config, weights=weights).logits(token_ids)
    found = MeshModel(config, dtype=jnp.bfloat16, weights=weights).logits(token_ids)
    assert relative_error(found, expected) < 0.03
