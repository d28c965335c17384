# SPDX-License-Identifier: Apache-2.0
"""Qwen3, dense: against float64 numpy and transformers, on meshes, and through what serves all."""

import json
from dataclasses import replace

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from checkpoint_writers import write_model
from mesh_model import MeshModel, random_tokens, relative_error, shared_model
from meshwen import AutoModelForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
from meshwen.checkpoints import open_checkpoint
from meshwen.cli import main
from meshwen.errors import MeshwenError
from meshwen.models.presets import preset
from meshwen.models.qwen3 import Qwen3Config
from meshwen.models.registry import config_from_dict
from meshwen.ops.cpu import kernels
from speller import write_tokenizer

pytestmark = pytest.mark.usefixtures("unoptimised")

# No mesh divides its vocabulary or heads; head_dim is not hidden_size / num_attention_heads.
UNTIED = Qwen3Config(
    vocab_size=263,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
)
ONE_LAYER = replace(UNTIED, num_hidden_layers=1, layer_types=())
TIED = replace(
    UNTIED,
    tie_word_embeddings=True,
    layer_types=("full_attention", "sliding_attention"),
    sliding_window=4,
)
ONE_LAYER_TIED = replace(TIED, num_hidden_layers=1, layer_types=("sliding_attention",))
# As published.
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# In units of the largest logit. float32 rounding gives 1e-6; a wrong model gives 1e-2 or more.
TOLERANCE = 1e-5
LENGTH, STEPS = 9, 5


def expected_logits(config: Qwen3Config, rows: np.ndarray) -> np.ndarray:
    weights = reference.random_weights(config)
    return np.stack([reference.logits(weights, config, row.tolist()) for row in rows])


def greedy(config: Qwen3Config, prompt: list[int]) -> tuple[int, ...]:
    tokens = list(prompt)
    for _ in range(STEPS):
        tokens.append(int(expected_logits(config, np.array([tokens]))[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny3"
    write_model(folder, ONE_LAYER, reference.random_weights(ONE_LAYER))
    write_tokenizer(folder)
    return folder


# --- The config


def test_a_published_config_is_read_and_written_back():
    config = config_from_dict(QWEN3_0_6B)
    assert config == preset("qwen3-0.6b")
    assert type(config) is Qwen3Config
    assert config.head_dim == 128
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.torch
def test_transformers_reads_what_is_written():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(**preset("qwen3-8b").to_dict())
    assert isinstance(theirs, transformers.Qwen3Config)
    assert Qwen3Config.from_dict(theirs.to_dict()) == preset("qwen3-8b")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head_dim": None}, "config.json: head_dim is missing"),
        ({"attention_bias": True}, "config.json: attention_bias true is not supported"),
        ({"model_type": "qwen3_moe"}, 'supported: .*Qwen3ForCausalLM .model_type "qwen3"'),
    ],
)
def test_what_is_no_dense_qwen3_is_refused(changes, said):
    with pytest.raises(MeshwenError, match=said):
        config_from_dict(QWEN3_0_6B | changes)


def test_a_preset_declares_the_published_number_of_parameters(capsys):
    assert main(["inspect", "qwen3-8b", "--mesh", "1x8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 8_190_735_360


# --- The forward pass


@pytest.mark.parametrize(
    ("config", "mesh"),
    [(ONE_LAYER, "1"), (TIED, "1x8"), (ONE_LAYER, "2x4"), (ONE_LAYER, "data=2,model=4")],
)
def test_logits_with_a_cache_are_those_of_the_float64_reference(config, mesh):
    rows = random_tokens(config, 2, LENGTH)
    found = shared_model(config, mesh).cached_logits(rows)[..., : config.vocab_size]
    assert relative_error(found, expected_logits(config, rows)) < TOLERANCE


def test_without_kernels_logits_are_those_of_the_float64_reference(monkeypatch):
    monkeypatch.setattr(kernels, "instruction_set", lambda: None)
    rows = random_tokens(TIED, 2, LENGTH)
    assert relative_error(MeshModel(TIED).logits(rows), expected_logits(TIED, rows)) < TOLERANCE


def test_a_wrong_norm_of_queries_would_be_noticed():
    weights = reference.random_weights(ONE_LAYER)
    for name in weights:
        if "q_norm" in name:
            weights[name] = weights[name][::-1].copy()
    rows, wrong = random_tokens(ONE_LAYER, 2, LENGTH), MeshModel(ONE_LAYER, weights=weights)
    found = shared_model(ONE_LAYER).logits(rows, wrong.params)
    assert relative_error(found, expected_logits(ONE_LAYER, rows)) > 100 * TOLERANCE


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    ("config", "dtype", "mesh", "bound"),
    [
        (ONE_LAYER, jnp.float32, "data=2,model=4", TOLERANCE),
        (ONE_LAYER_TIED, jnp.bfloat16, "2x4", 0.03),  # 8 bits: 0.004 a rounding.
    ],
    ids=["float32", "tied, bfloat16"],
)
def test_exact_bits_with_a_cache_on_a_mesh_are_those_of_one_forward_pass(
    config, dtype, mesh, bound
):
    rows = random_tokens(config, 2, LENGTH)
    one, many = (shared_model(config, m, dtype, "exact") for m in ("1", mesh))
    whole, cached = (
        logits[..., : config.vocab_size] for logits in (one.logits(rows), many.cached_logits(rows))
    )
    assert relative_error(whole, expected_logits(config, rows)) < bound
    np.testing.assert_array_equal(cached.view(np.int32), whole.view(np.int32))


def test_int8_stays_near_the_float64_reference():
    config = replace(ONE_LAYER, hidden_size=64, head_dim=32, intermediate_size=96)
    rows = random_tokens(config, 2, LENGTH)
    found = MeshModel(config, "data=2,model=4", quantization="int8").logits(rows)
    found = found[..., : config.vocab_size]
    assert relative_error(found, expected_logits(config, rows)) < 0.1


# --- What serves every architecture


def test_the_class_is_qwen3s_and_the_answers_are_those_of_float64(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", mesh="data=2,model=4")
    assert type(model) is Qwen3ForCausalLM
    prompts = [row.tolist() for row in random_tokens(ONE_LAYER, 3, 4)]
    found = model.generate(prompts, max_new_tokens=STEPS, temperature=0)
    assert [one.tokens for one in found] == [greedy(ONE_LAYER, prompt) for prompt in prompts]
    with pytest.raises(MeshwenError, match="tiny3 is a qwen3 model: load it with Qwen3ForCausalLM"):
        Qwen2ForCausalLM.from_pretrained(folder)


def test_inspect_and_verify_run_as_for_every_model(folder, capsys):
    assert main(["inspect", str(folder), "--mesh", "1x8", "--numerics", "exact"]) == 0
    assert "q_norm" in capsys.readouterr().out
    options = ("--meshes", "2", "--max-new-tokens", "2", "--numerics", "fast", "--self-test")
    assert main(["verify", "--model", str(folder), *options]) == 0
    assert "every promise was kept" in capsys.readouterr().out


def test_a_file_of_the_gguf_package_holds_the_same_weights(tmp_path):
    weights = reference.random_weights(UNTIED)
    path = write_gguf(tmp_path / "tiny3.gguf", UNTIED, weights)
    with open_checkpoint(str(path)) as found:
        assert replace(found.config, name=UNTIED.name, torch_dtype=UNTIED.torch_dtype) == UNTIED
        assert found.tensors.keys() == weights.keys()
        for name, array in weights.items():
            np.testing.assert_array_equal(found.tensors[name].read(), array)


def write_gguf(path, config, weights):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    for name, array in weights.items():
        stem, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- transformers


@pytest.mark.torch
@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
def test_logits_and_greedy_tokens_are_those_of_transformers(config, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    write_tokenizer(write_model(tmp_path, config, reference.random_weights(config)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert isinstance(theirs, transformers.Qwen3ForCausalLM)
    rows = random_tokens(config, 3, 24, seed=1)
    ids = torch.from_numpy(rows.astype(np.int64))
    with torch.no_grad():
        expected = theirs(ids).logits.numpy()
        tokens = theirs.generate(ids, max_new_tokens=STEPS, do_sample=False).numpy()
    for mesh in ("1", "1x8", "data=2,model=4"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, mesh=mesh, dtype="float32")
        assert type(model) is Qwen3ForCausalLM
        logits = np.asarray(model(rows))
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
        assert relative_error(logits, expected) < TOLERANCE
        found = model.generate(rows.tolist(), max_new_tokens=STEPS, temperature=0)
        assert [list(one.tokens) for one in found] == tokens[:, rows.shape[1] :].tolist()
