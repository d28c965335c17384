# SPDX-License-Identifier: Apache-2.0
"""JAX's settings and meshes that a caller has: the same bits as without, or one line."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import reference
from mesh_model import memory_checkpoint
from meshwen.causal_lm import Qwen2ForCausalLM
from meshwen.engine.options import EngineOptions
from meshwen.errors import MeshwenError
from meshwen.parallel.mesh import make_mesh
from meshwen.runtime import jax_settings
from test_mesh import run_python
from tiny_model import ONE_LAYER

pytestmark = pytest.mark.usefixtures("unoptimised")
IDS = [[5, 11, 3, 70, 8, 8, 200], [9, 1, 2, 3, 4, 250, 6]]
# What would stop the programs, or change what they give, if they followed it.
SETTINGS = {
    "jax_enable_x64": True,
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_default_matmul_precision": "bfloat16",
    "jax_transfer_guard": "disallow_explicit",
    "jax_random_seed_offset": 7,
    "jax_disable_jit": True,
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
}


def observe(mesh: str | Mesh, numerics: str) -> tuple:
    """Loads a model; gives tokens, their log-probabilities, and logits."""
    checkpoint = memory_checkpoint(ONE_LAYER, reference.random_weights(ONE_LAYER))
    options = EngineOptions(mesh=make_mesh(mesh), dtype="float32", numerics=numerics)
    model = Qwen2ForCausalLM.from_checkpoint(checkpoint, None, options)
    answers = model.generate(IDS, max_new_tokens=4, temperature=0.9, seed=3, logprobs=True)
    mask = np.ones((2, 7), int)
    mask[1, :2] = 0
    logits = np.asarray(model(IDS, attention_mask=mask))
    assert logits.dtype == np.float32
    return [(one.tokens, one.logprobs) for one in answers], logits[mask == 1].tolist()


@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_a_callers_settings_and_mesh_change_nothing(numerics):
    expected = observe("1x2", numerics)
    # Of other devices, or the model's own by other names.
    first = 4 if numerics == "fast" else 0
    devices = jax.devices()[first : first + 2]
    theirs = jax.make_mesh((1, 2), ("dp", "tp"), (AxisType.Explicit,) * 2, devices=devices)
    ours = make_mesh("1x2" if first else theirs, **({} if first else {"model_axes": "tp"}))
    before = {name: jax.config.values[name] for name in SETTINGS}
    try:
        for name, value in SETTINGS.items():
            jax.config.update(name, value)
        with jax.set_mesh(theirs):
            found = observe(ours, numerics)
            assert jax.sharding.get_abstract_mesh().axis_names == ("dp", "tp")  # Still set.
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert found == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eager_constant_folding", True),
        ("jax_error_checking_behavior_nan", "raise"),
        ("jax_no_tracing", True),
        pytest.param(
            "jax_no_execution",
            True,
            marks=pytest.mark.skipif(
                "jax_no_execution" not in jax.config.values,
                reason=f"jax {jax.__version__} has no such setting",
            ),
        ),
    ],
)
def test_a_setting_that_no_model_runs_under_is_named(name, value):
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        for mesh in ("1", Mesh(np.array(jax.devices()[:2]), ("model",))):
            with pytest.raises(MeshwenError, match=f"setting {name} is .*; set it back to"):
                make_mesh(mesh)
    finally:
        jax.config.update(name, before)


def test_a_jax_that_miscompiles_is_refused_on_cpus(monkeypatch):
    monkeypatch.setattr(jax_settings, "jaxlib_version", lambda: "0.10.2")
    with pytest.raises(MeshwenError, match=r"jaxlib 0\.10\.2 gives wrong results on CPUs"):
        make_mesh("1")


def test_a_platform_that_is_not_there_is_named():
    program = """
from meshwen.errors import MeshwenError
from meshwen.parallel.mesh import make_mesh
try:
    make_mesh("1")
except MeshwenError as error:
    print(error)
"""
    assert "platform 'cuda' (JAX_PLATFORMS), which is not there" in run_python(
        program, JAX_PLATFORMS="cuda"
    )
