# SPDX-License-Identifier: Apache-2.0
"""`save_pretrained`: the folder that it writes loads as the same model, here and elsewhere."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from gguf import GGUFWriter
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import reference
from checkpoint_writers import CONFIG, gguf_name, same_bits, write_gguf, write_model
from mesh_model import SMALL_HALF_B, MeshModel, random_tokens
from meshwen import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from meshwen.errors import MeshwenError
from speller import write_speller, write_tokenizer
from test_tokenizer import gguf_metadata
from tiny_model import ONE_LAYER

pytestmark = pytest.mark.usefixtures("unoptimised")
# As many tokens as the tokenizer has, and one row of padding.
TIED = replace(
    ONE_LAYER, vocab_size=260, tie_word_embeddings=True, eos_token_id=(258,), pad_token_id=256
)
# What `write_gguf` writes.
OF_GGUF = replace(Qwen2Config.from_dict(CONFIG), vocab_size=261)
IDS = random_tokens(TIED, 2, 7)


def write_tied(folder: Path, dtype=np.float32) -> Path:
    """A tiny model with everything that a folder can hold."""
    weights = {name: array.astype(dtype) for name, array in reference.random_weights(TIED).items()}
    write_model(folder, TIED, weights)
    write_tokenizer(folder)
    generation = {"eos_token_id": [258, 256], "temperature": 0.7, "do_sample": True, "odd": [1]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def write_gguf_model(folder: Path, weights: dict[str, np.ndarray]) -> Path:
    """A GGUF file with a chat template and the speller's tokens, one more, and one of padding."""
    write_tokenizer(folder)
    metadata = gguf_metadata(Tokenizer.from_file(str(folder / "tokenizer.json")))
    tokens = [*metadata["tokenizer.ggml.tokens"][:-2], "Hi", "[PAD0]"]
    kinds = [*metadata["tokenizer.ggml.token_type"][:-2], 1, 5]

    def add_tokenizer(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(metadata["tokenizer.ggml.model"])
        writer.add_tokenizer_pre(metadata["tokenizer.ggml.pre"])
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(["H i"])
        writer.add_eos_token_id(metadata["tokenizer.ggml.eos_token_id"])
        writer.add_chat_template(metadata["tokenizer.chat_template"])

    tensors = {gguf_name(name): (array, None) for name, array in weights.items()}
    return write_gguf(folder / "model.gguf", tensors, extra=add_tokenizer)


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def assert_same_model(found, expected) -> None:
    assert replace(found.config, torch_dtype="") == replace(expected.config, torch_dtype="")
    assert found.tokenizer.content == expected.tokenizer.content
    assert found.generation_config == expected.generation_config
    leaves = jax.tree.leaves(found.params)
    for one, other in zip(leaves, jax.tree.leaves(expected.params), strict=True):
        assert same_bits(np.asarray(one), np.asarray(other))
    assert same_bits(np.asarray(found(IDS)), np.asarray(expected(IDS)))


@pytest.mark.parametrize(
    "options",
    [
        {"mesh": "3", "dtype": "float32"},
        {"mesh": "data=2,model=4", "dtype": "bfloat16"},
        {"mesh": "1x8", "dtype": "float32", "numerics": "exact"},
    ],
    ids=str,
)
def test_a_saved_model_is_the_same_model(tmp_path, options):
    write_tied(tmp_path / "original")
    model = load(tmp_path / "original", **options)
    shutil.rmtree(tmp_path / "original")  # Nothing is read of it again.
    model.save_pretrained(tmp_path / "saved")
    assert_same_model(load(tmp_path / "saved", **options), model)


def test_the_folder_holds_hugging_faces_files(tmp_path):
    """Tied embeddings are written once, and padding not at all."""
    model = load(write_tied(tmp_path / "original"), mesh="1x8", dtype="bfloat16")
    model.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config == replace(TIED, torch_dtype="bfloat16").to_dict() | {
        "layer_types": list(TIED.layer_types)
    }
    found = load_file(tmp_path / "saved" / "model.safetensors")
    expected = reference.random_weights(TIED)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert same_bits(found[name], array.astype(found[name].dtype)), name


def test_a_saved_int8_model_is_the_same_where_it_is_quantised_again(tmp_path):
    options = {"mesh": "2", "dtype": "bfloat16", "quantization": "int8"}
    bfloat16 = MeshModel(TIED, dtype="bfloat16").params["model"]["norm"]["weight"].dtype
    model = load(write_tied(tmp_path / "original", bfloat16), **options)
    expected = r"int8 weights are saved as float32 numbers: load .* with quantization='int8'"
    with pytest.warns(UserWarning, match=expected):
        model.save_pretrained(tmp_path / "saved")
    assert_same_model(load(tmp_path / "saved", **options), model)


def test_shards_are_of_the_size_that_is_asked_for(tmp_path):
    model = load(write_tied(tmp_path / "original"), dtype="float32")
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("model-*-of-*.safetensors"))) > 1
    assert_same_model(load(tmp_path / "saved", dtype="float32"), model)
    with pytest.raises(MeshwenError, match="max_shard_size must be a number of bytes"):
        model.save_pretrained(tmp_path / "other", max_shard_size="a lot")
    assert not (tmp_path / "other").exists()


def test_a_model_may_be_saved_over_the_checkpoint_it_was_loaded_from(tmp_path):
    model = load(write_tied(tmp_path), dtype="float32")
    with pytest.raises(MeshwenError, match="has files of a checkpoint"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, overwrite=True)
    assert_same_model(load(tmp_path, dtype="float32"), model)


def test_a_model_of_a_gguf_file_is_saved_as_a_whole_folder(tmp_path):
    weights = reference.random_weights(OF_GGUF)
    model = load(write_gguf_model(tmp_path, weights), dtype="float32")
    model.save_pretrained(tmp_path / "saved")
    found = load(tmp_path / "saved", dtype="float32")
    ends = model.tokenizer.content["eos_token_ids"]
    assert found.tokenizer.content == model.tokenizer.content | {"eos_token_ids": ends[:1]}
    assert found._eos_token_ids() == model._eos_token_ids() == ends
    assert found.generation_config == model.generation_config
    assert same_bits(np.asarray(found(IDS)), np.asarray(model(IDS)))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(same_bits(saved[name], array) for name, array in weights.items())


def test_a_model_without_a_tokenizer_is_saved_without_one(tmp_path):
    model = Qwen2ForCausalLM(MeshModel(SMALL_HALF_B, "2x4").runner, None, {})
    with pytest.warns(UserWarning, match="has no tokenizer, so the folder has none"):
        model.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"config.json", "model.safetensors"}


def test_a_model_of_several_processes_is_refused(tmp_path, monkeypatch):
    model = Qwen2ForCausalLM(MeshModel(SMALL_HALF_B, "2x4").runner, None, {})
    monkeypatch.setattr(jax.sharding.Mesh, "is_multi_process", property(lambda mesh: True))
    with pytest.raises(MeshwenError, match="load the model in one process to save it"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.torch
@pytest.mark.parametrize("model", ["tied", "speller", "gguf"])
def test_transformers_loads_the_folder_and_gives_the_same_logits(tmp_path, model):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if model == "gguf":
        path = write_gguf_model(tmp_path, reference.random_weights(OF_GGUF))
    else:
        write = {"tied": write_tied, "speller": write_speller}[model]
        path = write(tmp_path / "original")
    ours = load(path, mesh="1x8", dtype="float32")
    ours.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        expected = theirs(torch.from_numpy(IDS.astype(np.int64) % 259)).logits.numpy()
    found = np.asarray(ours(IDS % 259))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    ends = theirs.generation_config.eos_token_id
    assert set(ours._eos_token_ids()) == {ends} if isinstance(ends, int) else set(ends)
