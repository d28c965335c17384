# SPDX-License-Identifier: Apache-2.0
"""Prefixes in files: found on every mesh with the bits of a cold run, and refused where wrong."""

import functools
import json
import os
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import reference
from mesh_model import MeshModel, random_tokens
from meshwen import Qwen2ForCausalLM
from meshwen.cache.kv_cache import KVCache
from meshwen.checkpoints import writing
from meshwen.engine.engine import Engine
from meshwen.engine.options import EngineOptions
from meshwen.engine.prefix_blocks import PrefixBlocks
from meshwen.engine.request import Completion, Request
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError
from meshwen.tokenizer.tokenizer import Tokenizer
from needs_kernels import needs_kernels
from speller import chat_ids, write_tokenizer
from tiny_model import FULL_LAST, FULL_LAYER, TINY, weights

SPLIT = "data=2,model=4"
SIZE = 32  # of a block
PROMPT = random_tokens(TINY, 1, 80, seed=3)[0].tolist()  # Two blocks and a half.
BFLOAT16 = ml_dtypes.bfloat16


@functools.cache
def model(mesh="1", dtype=np.float32, numerics="exact", config=FULL_LAYER, quantization=None):
    return MeshModel(config, mesh, dtype, numerics=numerics, quantization=quantization)


def engine(
    mesh="1", dtype=np.float32, numerics="exact", *, config=FULL_LAYER, quantization=None, **more
):
    options = EngineOptions(max_num_seqs=4, **more)
    runner = model(mesh, dtype, numerics, config, quantization).runner
    caching = options.prefix_caching
    return Engine(runner, None, (), options.cache_plan(runner.model), prefix_caching=caching)


def answers(running: Engine, *prompts, salt="", **sampling) -> list[Completion]:
    params = SamplingParams(**{"max_new_tokens": 4, "logprobs": True} | sampling)
    events = running.run([Request(tuple(prompt), params, salt) for prompt in prompts])
    done = {event.request: event.completion for event in events if event.completion}
    return [done[number] for number in range(len(prompts))]


def bits(completion: Completion):
    return completion.tokens, completion.logprobs


@functools.cache
def cold(dtype=np.float32):
    return bits(answers(engine(dtype=dtype), PROMPT)[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "prefix.safetensors"
    assert engine().save_prefix(path, PROMPT) == 2 * SIZE
    return path


# --- What a file holds


def test_a_file_holds_the_keys_and_values_of_the_models_own_heads(tmp_path):
    engine(SPLIT, numerics="fast", config=TINY).save_prefix(tmp_path / "file", PROMPT)
    found = load_file(tmp_path / "file")
    assert found["token_ids"].tolist() == PROMPT[: 2 * SIZE]
    states = reference.activations(weights(), TINY, PROMPT[: 2 * SIZE])
    half, K, H = TINY.head_dim // 2, TINY.num_key_value_heads, TINY.head_dim
    turns = np.arange(2 * SIZE)[:, None] * TINY.rope_theta ** (-np.arange(half) / half)
    for layer in range(TINY.num_hidden_layers):
        name = f"model.layers.{layer}"
        h = states[f"{name}.input_layernorm"]
        keys, values = (
            (h @ weights()[f"{name}.self_attn.{which}_proj.weight"].T.astype(np.float64))
            + weights()[f"{name}.self_attn.{which}_proj.bias"]
            for which in "kv"
        )
        keys, values = keys.reshape(-1, K, H), values.reshape(-1, K, H)
        spun = (keys[..., :half] + 1j * keys[..., half:]) * np.exp(1j * turns)[:, None]
        expected = np.concatenate([spun.real, spun.imag], axis=2)
        # A vector that is the same for all keys, which softmax does not see, is left out of them.
        np.testing.assert_allclose(
            np.diff(found["keys"][layer], axis=0), np.diff(expected, axis=0), atol=2e-4, rtol=0
        )
        np.testing.assert_allclose(found["values"][layer], values, atol=2e-4, rtol=0)


CASES = [
    ("1", np.float32, FULL_LAYER),
    pytest.param("2x4", BFLOAT16, FULL_LAST, marks=needs_kernels),
    (SPLIT, np.float32, FULL_LAYER),
    pytest.param(SPLIT, "int8", FULL_LAYER, marks=needs_kernels),
]


@pytest.mark.parametrize(("mesh", "kind", "config"), CASES)
def test_a_prefix_of_one_device_gives_the_bits_of_a_cold_run_on_a_mesh(
    tmp_path, optimised, mesh, kind, config
):
    how = {"dtype": BFLOAT16 if kind == "int8" else kind, "config": config}
    how["quantization"] = "int8" if kind == "int8" else None
    file, again = tmp_path / "file", tmp_path / "again"
    one = engine("1", **how)
    expected = bits(answers(one, PROMPT)[0])
    assert one.save_prefix(file, PROMPT) == 2 * SIZE
    running = engine(mesh, **how)
    assert running.load_prefix(file) == 2 * SIZE
    # Saved again, before anything is computed here.
    assert running.save_prefix(again, PROMPT[: 2 * SIZE]) == 2 * SIZE
    assert again.read_bytes() == file.read_bytes()
    found = answers(running, PROMPT, PROMPT, [*PROMPT[:40], 1, 2])
    assert [one.cached_tokens for one in found] == [2 * SIZE, 2 * SIZE, SIZE]
    assert bits(found[0]) == bits(found[1]) == expected
    assert bits(found[2]) == bits(answers(engine("1", **how), [*PROMPT[:40], 1, 2])[0])
    running._core.blocks.check()


def test_a_prefix_that_is_longer_than_what_is_moved_at_once_comes_in_whole(tmp_path):
    how = {"numerics": "fast"}
    prompt = random_tokens(FULL_LAYER, 1, 19 * SIZE + 1)[0].tolist()
    one, other = engine(**how), engine(SPLIT, **how)
    assert one.save_prefix(tmp_path / "file", prompt) == 19 * SIZE
    assert other.load_prefix(tmp_path / "file") == 19 * SIZE
    (found,) = answers(other, prompt)
    assert found.cached_tokens == 19 * SIZE
    (expected,) = answers(one, prompt)
    assert found.tokens == expected.tokens
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)


def test_what_is_in_the_cache_is_not_computed_again_to_be_saved(tmp_path, monkeypatch):
    running = engine()
    answers(running, PROMPT)
    monkeypatch.setattr(running, "run", lambda requests: pytest.fail("computed again"))
    assert running.save_prefix(tmp_path / "file", PROMPT) == 2 * SIZE
    assert running.cache_stats.queried_tokens == len(PROMPT)


def test_only_requests_with_its_salt_find_a_prefix(tmp_path):
    engine().save_prefix(tmp_path / "file", PROMPT, "a")
    running = engine()
    running.load_prefix(tmp_path / "file")
    assert answers(running, PROMPT)[0].cached_tokens == 0
    assert answers(running, PROMPT, salt="a")[0].cached_tokens == 2 * SIZE


@pytest.mark.parametrize("mesh", ["1", SPLIT])
def test_a_prefix_takes_no_blocks_where_it_is_cached(saved, mesh):
    running = engine(mesh, kv_cache_memory=_memory_of(3, mesh))
    (expected,) = answers(running, PROMPT)
    assert running.load_prefix(saved) == 2 * SIZE
    assert running.cache_stats.evictions == 0
    for found in answers(running, *[PROMPT] * running.cache_plan.parts):  # In every part.
        assert found.cached_tokens == 2 * SIZE
        assert bits(found) == bits(expected)


def test_a_loaded_prefix_gives_way_to_requests(saved):
    running = engine(kv_cache_memory=_memory_of(4))
    running.load_prefix(saved)
    other = random_tokens(TINY, 1, 100, seed=9)[0].tolist()
    assert bits(answers(running, other)[0]) == bits(answers(engine(), other)[0])
    assert running.cache_stats.evictions == 2
    assert answers(running, PROMPT)[0].cached_tokens < 2 * SIZE


def _memory_of(blocks: int, mesh="1") -> int:
    plan = EngineOptions(max_num_seqs=4).cache_plan(model(mesh).runner.model)
    return (blocks + 1) * plan.block_bytes


# --- What is refused


def _untouched(running: Engine) -> None:
    """Fails where a refused file has left a trace."""
    running._core.blocks.check()
    stats = running.cache_stats
    assert (stats.used_blocks, stats.evictions) == (0, 0)
    (found,) = answers(running, PROMPT)
    assert found.cached_tokens == 0
    assert bits(found) == cold()


def altered(path, tmp_path, change):
    """The file with other tensors or metadata, whose content's hash is as before."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    metadata, tensors = json.loads(content[8:end])["__metadata__"], load_file(path)
    change(metadata, tensors)
    save_file(tensors, tmp_path / "altered", metadata)
    return tmp_path / "altered"


def _set(name, index, value):
    def change(metadata, tensors):
        tensors[name][index] = value

    return change


ALTERED = [
    (lambda m, t: m.pop("format"), "is no file of a prefix, of version 1"),
    (lambda m, t: m.update(version="2"), "is no file of a prefix, of version 1"),
    (lambda m, t: m.pop("cache_salt"), "cache_salt"),
    (lambda m, t: m.update(cache_salt="b"), "is damaged"),
    (lambda m, t: m.update(exact_version="0"), 'saved with exact_version "0", this model has "'),
    (lambda m, t: m.update(matmuls_by="abacus"), 'saved with matmuls_by "abacus", this'),
    (lambda m, t: m.update(jax="0.1"), 'was saved with jax "0.1", this model has'),
    (lambda m, t: m.pop("weights_sha256"), "was saved with weights_sha256 null, this model has"),
    (lambda m, t: t.pop("values"), "must have the tensors token_ids, keys, values, not"),
    (lambda m, t: t.update(more=np.zeros(1)), "must have the tensors"),
    (lambda m, t: t.update(keys=t["keys"][:, 1:]), r"keys must be float32 \[1, 64, 2, 8\], not"),
    (lambda m, t: t.update(keys=t["keys"].astype(np.float16)), "keys must be float32"),
    (lambda m, t: t.update(values=t["values"][:, :32]), "values must be float32"),
    (lambda m, t: t.update(token_ids=t["token_ids"][:32]), "keys must be float32"),
    (lambda m, t: t.update(token_ids=t["token_ids"].astype(np.int64)), "token_ids must be int32"),
    (lambda m, t: t.update(token_ids=t["token_ids"].reshape(2, 32)), "token_ids must be int32"),
    (_set("token_ids", 5, 263), "has a token id outside the vocabulary of 263: 263"),
    (_set("token_ids", 5, -1), "has a token id outside the vocabulary of 263: -1"),
    (_set("token_ids", 5, 7), "is damaged"),
    (_set("keys", (0, 40, 0, 3), np.nan), "NaN or infinity in the keys of layer 0"),
    (_set("values", (0, 63, 1, 7), np.inf), "NaN or infinity in the values of layer 0"),
    (_set("values", (0, 63, 1, 7), 1.5), "is damaged"),
]


@pytest.fixture(scope="module")
def untouched():
    running = engine()
    yield running
    _untouched(running)


@pytest.mark.parametrize(("change", "message"), ALTERED)
def test_an_altered_file_is_refused(saved, tmp_path, untouched, change, message):
    with pytest.raises(MeshwenError, match=message) as error:
        untouched.load_prefix(altered(saved, tmp_path, change))
    assert "\n" not in str(error.value)


def test_what_is_no_whole_file_is_refused(saved, tmp_path, untouched):
    whole, path = saved.read_bytes(), tmp_path / "file"
    for content, message in (
        (b"", "is empty"),
        (whole[:5], "not a whole safetensors file"),
        (whole[:-1], "not a whole safetensors file"),
        (whole + b"\0", "not a whole safetensors file"),
        ((1 << 62).to_bytes(8, "little") + whole[8:], "not a whole safetensors file"),
        ((1 << 25).to_bytes(8, "little") + b" " * (1 << 25), "has a header of 33.6 MB"),
    ):
        path.write_bytes(content)
        with pytest.raises(MeshwenError, match=message):
            untouched.load_prefix(path)
    save_file({"a": np.zeros(1)}, path)
    with pytest.raises(MeshwenError, match="is no file of a prefix"):
        untouched.load_prefix(path)
    with pytest.raises(MeshwenError, match=r"cannot read .*No such file"):
        untouched.load_prefix(tmp_path / "nothing")
    for name in (tmp_path, os.devnull):
        with pytest.raises(MeshwenError, match="it is no regular file"):
            untouched.load_prefix(name)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ({"config": replace(FULL_LAYER, rms_norm_eps=1e-5)}, "config_sha256"),
        ({"config": replace(FULL_LAYER, max_position_embeddings=1000)}, "config_sha256"),
        ({"numerics": "fast"}, "numerics"),
        ({"dtype": BFLOAT16}, "dtype"),
        ({"quantization": "int8"}, "quantization"),
    ],
)
def test_a_prefix_of_another_model_is_refused(saved, how, name):
    with pytest.raises(MeshwenError, match=f"was saved with {name} .*, this model has"):
        engine(**how).load_prefix(saved)


def test_a_prefix_of_other_weights_is_refused(saved):
    other = MeshModel(
        FULL_LAYER, weights=reference.random_weights(FULL_LAYER, seed=1), numerics="exact"
    ).runner
    running = Engine(other, None, (), EngineOptions().cache_plan(other.model))
    with pytest.raises(MeshwenError, match=r"was saved with weights_sha256 .*, this model has"):
        running.load_prefix(saved)


def test_configs_that_differ_in_nothing_that_decides_keys_are_the_same(saved):
    config = replace(FULL_LAYER, eos_token_id=(1,), torch_dtype="bfloat16", name="another")
    assert engine(config=config).load_prefix(saved) == 2 * SIZE


def test_a_prefix_for_which_there_is_no_room_is_refused(saved):
    running = engine(kv_cache_memory=_memory_of(3))
    prompt = random_tokens(TINY, 1, 60, seed=5)[0].tolist()
    events = running.run([Request(tuple(prompt), SamplingParams(max_new_tokens=3))])
    next(events)
    with pytest.raises(MeshwenError, match="needs 2 KV blocks, of which 1 are free"):
        running.load_prefix(saved)
    assert sum(1 for _ in events) == 2
    assert running.load_prefix(saved) == 2 * SIZE
    with pytest.raises(MeshwenError, match=r"prefix of 64 tokens, but .* prompts of 1 to 63"):
        engine(max_model_len=64).load_prefix(saved)


def test_blocks_of_what_was_cancelled_are_free_for_a_prefix(saved):
    running = engine(kv_cache_memory=_memory_of(3))
    prompt = random_tokens(TINY, 1, 60, seed=5)[0].tolist()
    asked = Request(tuple(prompt), SamplingParams(max_new_tokens=3))
    number = running.submit(asked, lambda event: None)
    running.step()
    running.cancel(number)
    assert running.load_prefix(saved) == 2 * SIZE
    with running.run([asked]) as events:
        next(events)
    assert running.load_prefix(saved) == 2 * SIZE
    assert running.cache_stats.used_blocks == 0


def test_without_prefix_caching_there_is_nothing_to_save_or_load(saved, tmp_path):
    running = engine(prefix_caching=False)
    with pytest.raises(MeshwenError, match="cannot load a prefix without prefix caching"):
        running.load_prefix(saved)
    with pytest.raises(MeshwenError, match="cannot save a prefix without prefix caching"):
        running.save_prefix(tmp_path / "file", PROMPT)


def test_a_mesh_of_several_processes_is_refused(saved, tmp_path, monkeypatch):
    running = engine()
    monkeypatch.setattr(jax.sharding.Mesh, "is_multi_process", property(lambda mesh: True))
    with pytest.raises(MeshwenError, match="load the model in one process"):
        running.load_prefix(saved)
    with pytest.raises(MeshwenError, match="load the model in one process"):
        running.save_prefix(tmp_path / "file", PROMPT)


def test_what_cannot_be_saved_is_refused_before_it_is_computed(saved, tmp_path):
    running = engine()
    for path, prompt, message in (
        (saved, PROMPT, "exists: choose another name, or give overwrite=True"),
        (tmp_path, PROMPT, "it is no regular file"),
        (tmp_path / "a" / "b", PROMPT, "its folder does not exist"),
        (tmp_path / "file", PROMPT[:31], "the prompt of 31 tokens fills none of 32"),
        (tmp_path / "file", [263] * 40, "outside the vocabulary of 263"),
    ):
        with pytest.raises(MeshwenError, match=message):
            running.save_prefix(path, prompt)
    assert running.cache_stats.queried_tokens == 0
    assert not [*tmp_path.iterdir()]


def test_a_salt_that_is_no_unicode_is_not_saved(tmp_path):
    running = engine()
    with pytest.raises(MeshwenError, match="cache_salt must be valid Unicode"):
        running.save_prefix(tmp_path / "file", PROMPT, "\ud800")
    assert running.cache_stats.queried_tokens == 0
    assert not [*tmp_path.iterdir()]


# --- What breaks off


def test_a_file_is_whole_or_as_before(saved, tmp_path, monkeypatch):
    file, running = tmp_path / "file", engine()
    file.write_bytes(b"before")

    def full_disk(path, tensors, metadata):
        path.write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_safetensors", full_disk)
        with pytest.raises(MeshwenError, match=r"cannot write .*No space left"):
            running.save_prefix(file, PROMPT, overwrite=True)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]
    running.save_prefix(file, PROMPT, overwrite=True)
    assert file.read_bytes() == saved.read_bytes()


def test_after_a_load_that_breaks_off_requests_go_on_with_an_empty_cache(saved, monkeypatch):
    running = engine()
    answers(running, PROMPT[::-1])

    def breaks(self, cache: KVCache, tables, prefix):
        jax.tree.map(lambda array: array.delete(), cache)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(PrefixBlocks, "written", breaks)
        with pytest.raises(RuntimeError, match="out of memory"):
            running.load_prefix(saved)
    running._core.blocks.check()
    (found,) = answers(running, PROMPT)
    assert (found.cached_tokens, bits(found)) == (0, cold())
    assert running.load_prefix(saved) == 2 * SIZE


# --- From Python


def test_a_conversation_is_saved_as_longer_ones_begin(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    system = {"role": "system", "content": "Answer with a single word, please."}
    user = {"role": "user", "content": "What?"}
    runner = model().runner
    first, second = (Qwen2ForCausalLM(runner, tokenizer, {}) for _ in range(2))
    ids = chat_ids(("system", system["content"]))[: -len("assistant\n") - 1]
    expected = len(ids) // SIZE * SIZE
    assert first.save_prefix(tmp_path / "file", [system]) == expected
    assert load_file(tmp_path / "file")["token_ids"].tolist() == ids[:expected]
    assert second.load_prefix(tmp_path / "file") == expected
    (found,) = second.generate([system, user], max_new_tokens=2)
    assert found.cached_tokens == expected
    assert first.save_prefix(tmp_path / "file", "a" * 40, overwrite=True) == SIZE
