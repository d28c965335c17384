# SPDX-License-Identifier: Apache-2.0
"""What processes must agree on: a difference is named, with who has which."""

from dataclasses import replace

import numpy as np
import pytest

import reference
from mesh_model import MemoryTensor, memory_checkpoint
from meshwen.checkpoints.digest import sample_sha256
from meshwen.engine import agreement
from meshwen.engine.request import Request
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError
from tiny_model import ONE_LAYER


@pytest.fixture
def heard(monkeypatch):
    """What `check` of this process tells the others, by subject."""
    told = {}

    def gathered(name, mine):
        told[name] = mine
        return [mine, mine]

    monkeypatch.setattr(agreement, "process_count", lambda: 2)
    monkeypatch.setattr(agreement, "gathered", gathered)
    return told


def checkpoint(**changes):
    weights = reference.random_weights(ONE_LAYER)
    return replace(memory_checkpoint(ONE_LAYER, weights), **changes)


def test_a_difference_is_named_with_who_has_which(monkeypatch):
    told = [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 1, "b": "x"}, {"a": 1, "b": "y"}]
    monkeypatch.setattr(agreement, "process_count", lambda: 4)
    monkeypatch.setattr(agreement, "gathered", lambda name, mine: told)
    with pytest.raises(MeshwenError) as error:
        agreement.check_same("options", told[0], "start again")
    assert str(error.value) == (
        "options: b is x in processes 0, 2 but y in processes 1, 3; start again"
    )
    told[3] = {"a": 1}
    with pytest.raises(MeshwenError, match="but y in process 1 and null in process 3"):
        agreement.check_same("options", told[0], "start again")


def model_facts(heard, exact=False, **changes):
    agreement.check_model(checkpoint(**changes), None, {"dtype": "float32"}, exact)
    return heard["the processes' models"]


def test_all_that_decides_what_a_model_gives_is_compared(heard):
    base = model_facts(heard)
    assert base["dtype"] == "float32"
    config = replace(ONE_LAYER, rms_norm_eps=1e-5)
    weights = reference.random_weights(ONE_LAYER)
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name].copy()
    weights[name][3, 5] += 1e-3
    for changes, differs in (
        ({"config": config}, {"config rms_norm_eps"}),
        ({"generation_config": {"top_k": 3}}, {"generation_config top_k"}),
        ({"tensors": memory_checkpoint(ONE_LAYER, weights).tensors}, {f"tensor {name}"}),
    ):
        found = model_facts(heard, **changes)
        assert {k for k in {*base, *found} if base.get(k) != found.get(k)} == differs
    assert set(model_facts(heard, exact=True)) - set(base) == {"CPU instructions (exact numerics)"}
    environment = heard["the processes' environment"]
    assert {"meshwen", "jax", "jaxlib", "numpy", "kernels", "XLA_FLAGS"} <= set(environment)


def test_prompts_seeds_and_parameters_of_every_request_are_compared(heard):
    def facts(*requests):
        agreement.check_requests(requests)
        return heard["the processes' requests"]

    one, other = Request((1, 2), SamplingParams()), Request((3,), SamplingParams(seed=1))
    base = facts(one, other)
    assert facts(one, other) == base
    for changed in (
        (other, one),
        (one,),
        (one, replace(other, prompt_tokens=(4,))),
        (one, replace(other, sampling=SamplingParams(seed=2))),
    ):
        assert facts(*changed) != base
    found = facts(replace(one, sampling=SamplingParams(seed=5)), other)
    assert found["seed of the first"] == "5"


def test_rows_all_over_a_large_tensor_are_compared():
    array = np.zeros((1 << 14, 256), np.float32)  # 16 MB

    def of(array):
        one = MemoryTensor(
            name="t", shape=array.shape, dtype=array.dtype, nbytes=array.nbytes, array=array
        )
        return sample_sha256(one)

    before = of(array)
    assert of(array.copy()) == before
    for rows in (slice(0, 1), slice(-1, None), slice(8000, 10000)):
        changed = array.copy()
        changed[rows] = 1
        assert of(changed) != before
