# SPDX-License-Identifier: Apache-2.0
"""Exact numerics end to end: the demo model, 7B's full width, and the real checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_model import MeshModel, random_tokens
from meshwen import Qwen2ForCausalLM
from meshwen.engine.engine import Engine
from meshwen.engine.options import EngineOptions
from meshwen.engine.request import Request
from meshwen.engine.runner import ModelRunner
from meshwen.engine.sampling_params import SamplingParams
from meshwen.models.parallel_model import ParallelModel
from meshwen.models.qwen2 import Qwen2Config
from meshwen.parallel.mesh import make_mesh
from meshwen.weights.loading import dummy_params
from tiny_model import ONE_LAYER

DTYPES = ("float32", "bfloat16")

WIDTH_7B = Qwen2Config(
    vocab_size=152064 // 4,  # All of it takes most of the time to make.
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=1,
    num_attention_heads=28,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=True,
)


def load(path, mesh: str, dtype: str) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(path, mesh=mesh, dtype=dtype, numerics="exact")


def answers(model, prompts: Sequence[Sequence[int]], sampling: dict) -> list[tuple]:
    """Tokens and log-probabilities, which are the same numbers only if the same bits."""
    completions = model.generate(prompts, logprobs=True, **sampling)
    return [(completion.tokens, completion.logprobs) for completion in completions]


# Of equal length, so that nearly all steps draw for both kinds: a program for each set is compiled.
GREEDY = SamplingParams(temperature=0, max_new_tokens=16, logprobs=True, top_logprobs=4)
SEEDED = replace(
    GREEDY,
    **{"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.3, "seed": 7},
    **{"presence_penalty": 0.3, "frequency_penalty": -0.7, "logit_bias": {5: 1.1, 130: -2}},
)


def run(
    model: Qwen2ForCausalLM, requests: Mapping[int, Request], batch: int, tokens: int = 512
) -> dict[int, tuple]:
    """By request: tokens and log-probabilities, the same numbers only if the same bits.

    At most `batch` requests at once, in steps of at most so many `tokens`.
    """
    plan = EngineOptions(max_num_seqs=batch).cache_plan(model.runner.model)
    engine = Engine(model.runner, None, (), plan, max_num_batched_tokens=tokens)
    numbers = list(requests)
    events = engine.run(list(requests.values()))
    done = {numbers[e.request]: e.completion for e in events if e.completion}
    return {n: (one.tokens, one.logprobs, one.top_logprobs) for n, one in done.items()}


@pytest.mark.slow
def test_the_demo_model_answers_alike_on_every_mesh_in_every_batch():
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, 1000, length).tolist()) for length in (1, 37, 9, 2)]
    requests = dict(enumerate(Request(p, s) for p in prompts for s in (GREEDY, SEEDED)))
    expected = run(load("demo", "1", "bfloat16"), requests, 8)
    assert len(expected) == len(requests)
    for mesh, batch in (("8x4", 8), ("data=2,model=4", 4)):
        order = [(3 * number + 5) % len(requests) for number in requests]
        found = run(load("demo", mesh, "bfloat16"), {n: requests[n] for n in order}, batch)
        assert found == expected


def test_what_is_drawn_does_not_depend_on_load():
    """With all that sampling has; `test_exact_schedules.py` has other meshes and schedules."""
    runner = MeshModel(ONE_LAYER, "data=2,model=2", numerics="exact").runner
    model = Qwen2ForCausalLM(runner, None, {})
    # Prompts of few buckets, and those that are drawn for end last: little is compiled.
    requests = {
        n: Request(
            tuple(random_tokens(ONE_LAYER, 1, length, seed=n)[0].tolist()),
            replace(GREEDY if length == 9 else SEEDED, max_new_tokens=2 if length == 9 else 2 + n),
        )
        for n, length in enumerate((9, 10, 13, 16, 40, 9, 11))
    }
    alone = {n: run(model, {n: request}, 1)[n] for n, request in requests.items()}
    order = (4, 0, 6, 2, 5, 1, 3)
    assert run(model, {n: requests[n] for n in order}, 4, tokens=32) == alone


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_of_7b_has_the_same_bits_on_8_and_32_devices(dtype):
    token_ids = np.random.default_rng(0).integers(0, WIDTH_7B.vocab_size, (2, 24)).astype(np.int32)
    found = []
    for mesh in ("1", "1x8") if dtype == "float32" else ("1", "8x4"):
        model = ParallelModel(WIDTH_7B, make_mesh(mesh), jnp.dtype(dtype), "exact")
        runner = ModelRunner(model, dummy_params(model.weights))
        found.append(np.asarray(runner.logits(token_ids)))
        one = np.asarray(runner.logits(token_ids[1:, :8]))
        np.testing.assert_array_equal(one[0].view(np.int32), found[0][1, :8].view(np.int32))
        for array in jax.tree.leaves(runner.params):  # Not to wait for the collector.
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
        model = load(real_model_dir, mesh, dtype)
        found = answers(model, prompts, settings), answers(model, prompts[:1], seeded)
        expected = expected or found
        assert found == expected
        assert answers(model, prompts[2:3], settings) == expected[0][2:3]
    if dtype == "float32":
        for case, (tokens, _) in zip(cases, expected[0], strict=True):
            assert list(tokens) == case["greedy"][:16]
