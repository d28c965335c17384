# SPDX-License-Identifier: Apache-2.0
"""Weights handed to Tunix' Qwen2 and taken back; where it is installed, its logits too.

To install it: `pip install -e '.[dev]' 'google-tunix>=0.1.7,<0.2'` in an environment of its own.
"""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest

import reference
from checkpoint_writers import same_bits
from mesh_model import SMALL_7B, SMALL_HALF_B, MeshModel, random_tokens, relative_error
from meshwen.errors import MeshwenError
from meshwen.handoff.tunix import from_tunix, to_tunix
from meshwen.models.parallel_model import ParallelModel
from meshwen.models.presets import preset
from meshwen.parallel.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("unoptimised")
UNTIED, TIED = (
    replace(one, num_hidden_layers=1, layer_types=()) for one in (SMALL_7B, SMALL_HALF_B)
)
# As declared in tunix/models/qwen2/model.py, of UNTIED: D 224, N 28, K 4, H 8, F 1184, V 1003.
SHAPES = {
    "embedder.input_embedding": (1003, 224),
    "final_norm.w": (224,),
    "lm_head.w": (224, 1003),
    "layers.0.input_layernorm.w": (224,),
    "layers.0.post_attention_layernorm.w": (224,),
    "layers.0.attn.q_proj.w": (224, 28, 8),
    "layers.0.attn.k_proj.w": (224, 4, 8),
    "layers.0.attn.v_proj.w": (224, 4, 8),
    "layers.0.attn.o_proj.w": (28, 8, 224),
    "layers.0.attn.q_bias": (224,),
    "layers.0.attn.k_bias": (32,),
    "layers.0.attn.v_bias": (32,),
    "layers.0.mlp.gate_proj.kernel": (224, 1184),
    "layers.0.mlp.up_proj.kernel": (224, 1184),
    "layers.0.mlp.down_proj.kernel": (1184, 224),
}


def flat(state, prefix=""):
    items = state.items() if isinstance(state, dict) else []
    found = {k: v for key, node in items for k, v in flat(node, f"{prefix}{key}.").items()}
    return found if isinstance(state, dict) else {prefix[:-1]: state}


def test_the_state_has_the_names_and_shapes_of_tunix():
    model = MeshModel(UNTIED, "1x8")
    state = to_tunix(model.params, model.runner.model)
    assert list(state["layers"]) == [0]
    assert {name: array.shape for name, array in flat(state).items()} == SHAPES


def test_heads_are_rows_of_the_checkpoint():
    weights = reference.random_weights(UNTIED)
    model = MeshModel(UNTIED, "3", weights=weights)
    attention = to_tunix(model.params, model.runner.model)["layers"][0]["attn"]
    checkpoint = {kind: weights[f"model.layers.0.self_attn.{kind}_proj.weight"] for kind in "qo"}
    np.testing.assert_array_equal(attention["q_proj"]["w"][:, 5, 3], checkpoint["q"][5 * 8 + 3])
    np.testing.assert_array_equal(attention["o_proj"]["w"][5, 3], checkpoint["o"][:, 5 * 8 + 3])


@pytest.mark.parametrize(
    ("config", "mesh", "numerics"), [(UNTIED, "2x4", "fast"), (TIED, "1x8", "exact")]
)
def test_what_comes_back_has_the_same_bits(config, mesh, numerics):
    model = MeshModel(config, mesh, numerics=numerics)
    state = to_tunix(model.params, model.runner.model)
    assert ("lm_head" in state) is not config.tie_word_embeddings
    back = from_tunix(state, model.runner.model)
    for found, expected in zip(jax.tree.leaves(back), jax.tree.leaves(model.params), strict=True):
        assert same_bits(np.asarray(found), np.asarray(expected))


def state_of(change) -> dict:
    model = MeshModel(TIED)
    state = to_tunix(model.params, model.runner.model)
    change(state["layers"][0])
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer["attn"].pop("q_bias"), "q_proj.bias [112] is missing"),
        (lambda layer: layer["attn"].update(w_lora_a=np.zeros(1)), "has layers.0.attn.w_lora_a"),
        (
            lambda layer: layer["attn"].update(q_bias=np.zeros((14, 8))),
            "has layers.0.attn.q_bias of shape [14, 8], and the config makes it [112]",
        ),
        (
            lambda layer: layer["attn"].update(q_bias=np.full(112, np.nan)),
            "q_proj.bias holds NaN",
        ),
    ],
)
def test_another_state_is_refused_by_name(change, message):
    model = ParallelModel(TIED, make_mesh("1"), np.dtype(np.float32))
    with pytest.raises(MeshwenError, match=re.escape(message)):
        from_tunix(state_of(change), model)


def test_other_architectures_are_refused():
    model = ParallelModel(preset("qwen3-0.6b"), make_mesh("1"), np.dtype(np.float32))
    with pytest.raises(MeshwenError, match="the model is a qwen3: Tunix' names"):
        to_tunix({}, model)


@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
def test_tunix_gives_the_same_logits(config):
    qwen2 = pytest.importorskip("tunix.models.qwen2.model", reason="google-tunix is not installed")
    from flax import nnx

    theirs = qwen2.Qwen2(
        qwen2.ModelConfig(
            num_layers=config.num_hidden_layers,
            vocab_size=config.vocab_size,
            embed_dim=config.hidden_size,
            hidden_dim=config.intermediate_size,
            num_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            num_kv_heads=config.num_key_value_heads,
            rope_theta=config.rope_theta,
            norm_eps=config.rms_norm_eps,
            use_tied_embedding=config.tie_word_embeddings,
        ),
        rngs=nnx.Rngs(0),
    )
    model = MeshModel(config, "1x8")
    graph, state = nnx.split(theirs)
    nnx.replace_by_pure_dict(state, to_tunix(model.params, model.runner.model))
    theirs = nnx.merge(graph, state)
    ids = random_tokens(config, 2, 12)
    positions = np.broadcast_to(np.arange(12), ids.shape)
    causal = np.broadcast_to(np.tri(12, dtype=bool), (2, 12, 12))
    expected, _ = theirs(ids, positions, None, causal)
    found = model.logits(ids)[..., : config.vocab_size]
    assert relative_error(found, np.asarray(expected)) < 1e-5
    back = from_tunix(nnx.to_pure_dict(nnx.state(theirs)), model.runner.model)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(model.params), strict=True):
        assert same_bits(np.asarray(one), np.asarray(other))
