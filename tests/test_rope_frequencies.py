# SPDX-License-Identifier: Apache-2.0
"""Rotary frequencies against the papers' formulas in float64, and against transformers."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshwen.errors import MeshwenError
from meshwen.models.presets import preset
from meshwen.models.qwen2 import Qwen2Config
from meshwen.models.rope_frequencies import inverse_frequencies, mean_rotation
from meshwen.models.rope_scaling import RopeScaling

SCALINGS = {
    "default": None,
    "linear": RopeScaling(rope_type="linear", factor=3.0),
    "yarn": RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768),
    "yarn, not truncated": RopeScaling(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=32768, truncate=False
    ),
    "yarn, mscale": RopeScaling(
        rope_type="yarn",
        factor=40.0,
        original_max_position_embeddings=4096,
        beta_fast=20.0,
        beta_slow=2.0,
        mscale=0.7,
        mscale_all_dim=1.1,
    ),
    "yarn, one mscale": RopeScaling(
        rope_type="yarn", factor=8.0, original_max_position_embeddings=4096, mscale=0.7
    ),
    "yarn, attention factor": RopeScaling(
        rope_type="yarn", factor=2.5, original_max_position_embeddings=8192, attention_factor=1.5
    ),
    "yarn, no stretch": RopeScaling(
        rope_type="yarn", factor=1.0, original_max_position_embeddings=32768
    ),
    "yarn, no blend": RopeScaling(
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=32768,
        beta_fast=4.0,
        beta_slow=4.0,
        truncate=False,
    ),
    "yarn, tiny context": RopeScaling(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=4
    ),
}
scalings = pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())


def config_with(theta: float, head_dim: int, scaling: RopeScaling | None) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=64,
        hidden_size=4 * head_dim,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=theta,
        rope_scaling=scaling,
    )


def yarn_pair(pair: int, theta: float, head_dim: int, scaling: RopeScaling) -> float:
    """One pair's frequency, by the paper's own steps: how often it turns, then how far to blend."""

    def pair_turning(turns: float) -> float:
        # theta ** (2 pair / head_dim) = context / (2 pi turns), solved for the pair
        context = scaling.original_max_position_embeddings
        return head_dim / 2 * math.log(context / (2 * math.pi * turns), theta)

    first, last = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first if last != first else 0.001
    stretched = min(max((pair - first) / width, 0.0), 1.0)
    plain = theta ** (-2.0 * pair / head_dim)
    return plain * ((1.0 - stretched) + stretched / scaling.factor)


@scalings
@pytest.mark.parametrize("head_dim", [8, 64, 96, 128])
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_frequencies_follow_the_papers_in_float64(theta, head_dim, scaling):
    frequencies, _ = inverse_frequencies(config_with(theta, head_dim, scaling))
    pairs = range(head_dim // 2)
    if scaling is None:
        expected = [theta ** (-2.0 * pair / head_dim) for pair in pairs]
    elif scaling.rope_type == "linear":
        expected = [theta ** (-2.0 * pair / head_dim) / 3.0 for pair in pairs]
    else:
        expected = [yarn_pair(pair, theta, head_dim, scaling) for pair in pairs]
    assert frequencies.dtype == np.float32
    assert frequencies.shape == (head_dim // 2,)
    np.testing.assert_allclose(frequencies, expected, rtol=2e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("default", 1.0),
        ("linear", 1.0),
        ("yarn", 1.1386294361119891),  # 0.1 ln 4 + 1
        ("yarn, mscale", 1.258221561787976 / 1.405776739952533),  # 0.07 ln 40 + 1, 0.11 ln 40 + 1
        ("yarn, one mscale", 1.2079441541679836),  # 0.1 ln 8 + 1
        ("yarn, attention factor", 1.5),
        ("yarn, no stretch", 1.0),
    ],
)
def test_attention_factor(name, expected):
    _, factor = inverse_frequencies(config_with(1e6, 128, SCALINGS[name]))
    assert factor == pytest.approx(expected, rel=1e-12)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones_by_the_factor():
    plain = preset("qwen2.5-7b")
    yarn, _ = inverse_frequencies(dataclasses.replace(plain, rope_scaling=SCALINGS["yarn"]))
    before, _ = inverse_frequencies(plain)
    turns = 32768 * before / (2 * math.pi)
    np.testing.assert_array_equal(yarn[turns > 64], before[turns > 64])
    np.testing.assert_allclose(yarn[turns < 0.5], before[turns < 0.5] / 4, rtol=1e-6)
    assert np.all(np.diff(yarn) < 0)


@pytest.mark.torch
@scalings
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
@pytest.mark.parametrize("theta", [1e4, 1e6, 1e7])
def test_frequencies_agree_with_transformers_to_the_last_bits(theta, head_dim, scaling):
    transformers = pytest.importorskip("transformers")
    qwen2 = pytest.importorskip("transformers.models.qwen2.modeling_qwen2")
    config = config_with(theta, head_dim, scaling)
    frequencies, factor = inverse_frequencies(config)
    theirs = qwen2.Qwen2RotaryEmbedding(transformers.Qwen2Config.from_dict(config.to_dict()))
    np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=2.5e-7)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


# Numbers at the ends of what is taken, in every combination that is.
SETTINGS = {
    "factor": st.sampled_from([1.0, 1.5, 1e3, 2.0**30]),
    "original_max_position_embeddings": st.sampled_from([1, 7, 2**20, 2**31 - 1]),
    "beta_fast": st.sampled_from([1e-3, 1.0, 32.0, 1e6]),
    "beta_slow": st.sampled_from([1e-3, 1.0, 32.0]),
    "attention_factor": st.sampled_from([None, 5e-324, 1e-3, 1e3, 1e300]),
    "mscale": st.sampled_from([None, -100.0, 0.0, 1e-3, 1e3, 1e300]),
    "mscale_all_dim": st.sampled_from([None, -100.0, 0.0, 1e-3, 1e3]),
    "truncate": st.booleans(),
}
PAIR = {"mscale_all_dim": 1.0}


@given(
    st.fixed_dictionaries(SETTINGS, optional={"rope_type": st.just("linear")}),
    st.sampled_from([1.0, math.nextafter(1.0, 2.0), 1.001, 1e4, 1e28, 1e38]),
    st.sampled_from([2, 4, 128]),
)
@example({"factor": 2.0**30, "original_max_position_embeddings": 1}, 1e38, 128)
@example({"factor": 4.0, "original_max_position_embeddings": 1, "mscale": -1e2} | PAIR, 1e4, 4)
@example({"factor": 4.0, "original_max_position_embeddings": 1, "beta_slow": 5e-324}, 1e4, 4)
def test_whatever_numbers_are_taken_give_frequencies_and_a_factor(numbers, theta, head_dim):
    try:
        scaling = RopeScaling(**{"rope_type": "yarn"} | numbers)
        config = config_with(theta, head_dim, scaling)
    except MeshwenError:
        return
    with np.errstate(all="raise", under="ignore"):
        frequencies, factor = inverse_frequencies(config)
    assert ((frequencies >= 0) & (frequencies <= 1)).all()
    assert 1e-3 <= factor <= 1e3


@pytest.mark.torch
def test_unscaled_frequencies_of_the_published_sizes_equal_those_of_pytorch():
    torch = pytest.importorskip("torch")
    for head_dim in (64, 128):
        frequencies, _ = inverse_frequencies(config_with(1e6, head_dim, None))
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        off = frequencies != (1.0 / 1e6**exponents).numpy()
        assert off.sum() <= 1, (
            "one pair may be an ulp off; PyTorch's power is not correctly rounded"
        )


def test_config_and_rope_need_no_jax():
    modules = "meshwen.models.config, meshwen.models.rope_frequencies"
    script = f"import {modules}, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("context", [1, 300, 32_768, 131_072])
def test_the_mean_rotation_is_that_of_the_positions_of_the_context(context):
    config = dataclasses.replace(preset("qwen2.5-0.5b"), max_position_embeddings=context)
    angles = np.arange(min(context, 32_768))[:, None] * inverse_frequencies(config)[0].astype(float)
    cos, sin = mean_rotation(config)
    np.testing.assert_allclose(cos, np.cos(angles).mean(axis=0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles).mean(axis=0), rtol=0, atol=1e-6)


def test_the_mean_rotation_is_of_the_frequencies_that_are_in_force():
    scaling = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32_768)
    plain = preset("qwen2.5-0.5b")
    scaled = dataclasses.replace(plain, rope_scaling=scaling)
    frequencies, factor = inverse_frequencies(scaled)
    angles = np.arange(32_768)[:, None] * frequencies.astype(float)
    assert factor > 1
    cos, _ = mean_rotation(scaled)
    np.testing.assert_allclose(cos, factor * np.cos(angles).mean(axis=0), rtol=0, atol=1e-6)
    assert not np.allclose(cos, mean_rotation(plain)[0], atol=0.1)
