# SPDX-License-Identifier: Apache-2.0
"""Exact numerics end to end: the demo model, 7B's full width, and the real checkpoint."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwen import Qwen2ForCausalLM
from meshwen.config import Qwen2Config
from meshwen.loading import dummy_params
from meshwen.parallel.mesh import make_mesh
from meshwen.parallel.plan import ParallelPlan
from meshwen.runner import ModelRunner

MESHES = ("1", "2x4", "8x4", "data=2,model=4")
PROMPT_LENGTHS = (1, 512, 37, 130, 8, 2, 64)
DTYPES = ("float32", "bfloat16")

WIDTH_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=2,
    num_attention_heads=28,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
)


def load(path, mesh: str, dtype: str, batch: int) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(
        path, mesh=mesh, dtype=dtype, numerics="exact", max_num_seqs=batch
    )


def answers(model, prompts: Sequence[Sequence[int]], sampling: dict) -> list[tuple]:
    """Tokens and log-probabilities, which are the same numbers only if the same bits."""
    completions = model.generate(prompts, logprobs=True, **sampling)
    return [(completion.tokens, completion.logprobs) for completion in completions]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 1000, length).tolist() for length in PROMPT_LENGTHS]


SAMPLING = {
    "greedy": {"temperature": 0, "max_new_tokens": 32},
    "seeded": {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 7, "max_new_tokens": 8},
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_demo_model_answers_alike_on_every_mesh_in_every_batch(prompts, dtype):
    model = load("demo", "1", dtype, 8)
    expected = {k: answers(model, prompts, v) for k, v in SAMPLING.items()}
    for mesh in MESHES[1:]:
        model = load("demo", mesh, dtype, 8)
        assert answers(model, prompts, SAMPLING["seeded"]) == expected["seeded"]
        assert answers(model, prompts, SAMPLING["greedy"]) == expected["greedy"]
    for batch, mesh in ((1, "1x32"), (3, "1x8")):  # The prompts in another order.
        order = [3, 1, 6, 0, 2][: 2 * batch + 1]
        model = load("demo", mesh, dtype, batch)
        for kind in SAMPLING:
            found = answers(model, [prompts[i] for i in order], SAMPLING[kind])
            assert found == [expected[kind][i] for i in order]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_layers_of_7b_have_the_same_bits_on_8_and_32_devices(dtype):
    token_ids = np.random.default_rng(0).integers(0, WIDTH_7B.vocab_size, (2, 24)).astype(np.int32)
    found = []
    for mesh in ("1", "1x8", "8x4"):
        plan = ParallelPlan(WIDTH_7B, make_mesh(mesh), "exact")
        runner = ModelRunner(plan, dummy_params(plan, jnp.dtype(dtype)), jnp.dtype(dtype))
        found.append(np.asarray(runner.logits(token_ids)))
        one = np.asarray(runner.logits(token_ids[1:, :8]))
        np.testing.assert_array_equal(one[0].view(np.int32), found[0][1, :8].view(np.int32))
        for array in jax.tree.leaves(runner.params):  # Up to 6 GB: not to wait for the collector.
            array.delete()
    assert np.isfinite(found[0]).all()
    assert found[0].std() > 0
    for logits in found[1:]:
        np.testing.assert_array_equal(logits.view(np.int32), found[0].view(np.int32))


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_real_model_answers_alike_on_every_mesh_and_as_transformers(
    real_model_dir, golden, dtype
):
    cases = [case for case in golden["cases"] if len(case["input_ids"]) < 100][:4]
    prompts = [case["input_ids"] for case in cases]
    settings = {"temperature": 0, "max_new_tokens": 16}
    seeded = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "max_new_tokens": 8}
    expected = None
    # Minutes each on a slow CPU: the mesh between in one dtype.
    for mesh in ("1", "1x8", "8x4") if dtype == "bfloat16" else ("1", "8x4"):
        model = load(real_model_dir, mesh, dtype, 4)
        found = answers(model, prompts, settings), answers(model, prompts[:1], seeded)
        expected = expected or found
        assert found == expected
        assert answers(model, prompts[2:3], settings) == expected[0][2:3]
    if dtype == "float32":
        for case, (tokens, _) in zip(cases, expected[0], strict=True):
            assert list(tokens) == case["greedy"][:16]
