# SPDX-License-Identifier: Apache-2.0
"""Every mesh gives what one device gives, with the collectives it should have and no others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from mesh_model import (
    SMALL_7B,
    SMALL_HALF_B,
    MeshModel,
    collectives,
    padded_rows,
    random_tokens,
    relative_error,
    shared_model,
    whole,
    with_numbers,
)
from meshwen.engine.sampling import SamplerRows, SamplingMethod
from meshwen.engine.sampling_params import SamplingParams
from meshwen.ops.cpu import kernels
from meshwen.parallel.heads import PADDING

pytestmark = pytest.mark.usefixtures("unoptimised")
# In units of the largest logit. float32 rounding gives 1e-6, whatever the order of the sums.
TOLERANCE = 1e-5
BATCH, LENGTH, CHUNK, SLOTS = 4, 12, 4, 16
CONFIGS = {"28 over 4 heads": SMALL_7B, "14 over 2 heads, tied": SMALL_HALF_B}

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
# Most meshes once, with one of the head counts.
every_layout = pytest.mark.parametrize(
    ("config", "mesh"),
    [
        pytest.param(config, mesh, id=f"{name}, {mesh}")
        for (name, config), meshes in zip(
            CONFIGS.items(),
            (
                ("2", "3", "6", "7", "2x4", "8x4", "data=2,model=4"),
                ("3", "4", "5", "1x8", "1x32", "data=2,model=4"),
            ),
            strict=True,
        )
        for mesh in meshes
    ],
)


def one_device(config) -> np.ndarray:
    return shared_model(config).logits(random_tokens(config, BATCH, LENGTH))


def without_padding(config, padded: np.ndarray) -> np.ndarray:
    """The vocabulary's logits; what stands behind them must be zeros."""
    assert not padded[..., config.vocab_size :].any()
    return padded[..., : config.vocab_size]


@every_config
def test_one_device_agrees_with_the_float64_reference(config):
    weights = reference.random_weights(config)
    rows = random_tokens(config, BATCH, LENGTH)
    expected = np.stack([reference.logits(weights, config, row.tolist()) for row in rows])
    assert relative_error(one_device(config), expected) < TOLERANCE


@every_layout
def test_logits_of_a_forward_pass_are_those_of_one_device(config, mesh):
    model = shared_model(config, mesh)
    found = model.logits(random_tokens(config, BATCH, LENGTH))
    assert found.shape[-1] % model.plan.model_devices == 0
    assert relative_error(without_padding(config, found), one_device(config)) < TOLERANCE


@every_layout
def test_logits_with_a_cache_are_those_of_one_device(config, mesh):
    model, expected = shared_model(config, mesh), one_device(config)
    token_ids, lengths = random_tokens(config, BATCH, LENGTH), np.array([1, 4, 2, 3])
    prompts = padded_rows(lengths, token_ids)[:, :CHUNK]
    out, cache = model.step(prompts, [0] * BATCH, model.cache(BATCH, SLOTS))
    out = without_padding(config, out)
    for row, length in enumerate(lengths):
        assert relative_error(out[row, :length], expected[row, :length]) < TOLERANCE
    rows = np.arange(BATCH)[:, None]
    for _ in range(2):  # From each row's own position.
        where = lengths[:, None] + np.arange(CHUNK)
        out, cache = model.step(token_ids[rows, where], lengths, cache)
        assert relative_error(without_padding(config, out), expected[rows, where]) < TOLERANCE
        lengths = lengths + CHUNK


@pytest.mark.parametrize("mesh", ["2x4", "data=2,model=4"])
def test_decoding_one_token_at_a_time_is_that_of_one_device(mesh):
    model, token_ids = shared_model(SMALL_7B, mesh), random_tokens(SMALL_7B, BATCH, LENGTH)
    cache, found = model.cache(BATCH, SLOTS), []
    for t in range(LENGTH):
        out, cache = model.step(token_ids[:, t : t + 1], [t] * BATCH, cache)
        found.append(without_padding(SMALL_7B, out))
    assert relative_error(np.concatenate(found, 1), one_device(SMALL_7B)) < TOLERANCE


def test_bfloat16_costs_no_more_accuracy_on_many_devices():
    token_ids = random_tokens(SMALL_7B, BATCH, LENGTH)
    errors = []
    for mesh in ("1", "1x8"):
        found = MeshModel(SMALL_7B, mesh, jnp.bfloat16).logits(token_ids)
        errors.append(relative_error(without_padding(SMALL_7B, found), one_device(SMALL_7B)))
    assert errors[1] < max(0.03, 1.5 * errors[0])


@every_layout
@pytest.mark.parametrize("slots", [None, SLOTS], ids=["no cache", "cache"])
def test_two_all_reduces_a_layer_and_one_for_the_embedding(config, mesh, slots):
    model = shared_model(config, mesh)
    length = LENGTH if slots is None else CHUNK
    blocks = None if slots is None else len(model.cache(BATCH, slots)[0].keys)
    found = collectives(model.compiled(BATCH, length, blocks).as_text())
    expected = 2 * config.num_hidden_layers + 1
    assert found == [("all-reduce", model.plan.model_devices)] * expected


@pytest.mark.parametrize("mesh", ["2x4", "data=2,model=4"])
def test_prefill_communicates_no_more_and_decoding_only_its_best_tokens(mesh):
    model, n = shared_model(SMALL_7B, mesh), shared_model(SMALL_7B, mesh).plan.model_devices
    runner, cache = model.runner, model.cache(BATCH, SLOTS)
    expected = [("all-reduce", n)] * (2 * SMALL_7B.num_hidden_layers + 1)
    start = np.zeros(BATCH, np.int32)
    prompts = model.inputs(np.zeros((BATCH, CHUNK), np.int32), start, cache)
    prefill = runner.forward_program.lower(runner.params, cache, prompts)
    assert collectives(prefill.compile().as_text()) == expected
    greedy = [SamplingParams()] * BATCH
    method, rows = SamplingMethod.of(greedy, SMALL_7B.vocab_size), SamplerRows.of(greedy)
    tokens = model.inputs(start[:, None], start, cache)
    decode = runner.sampling_program.lower(runner.params, cache, tokens, rows, None, method=method)
    # The likeliest token of each part of the vocabulary: its logit and its id.
    assert collectives(decode.compile().as_text()) == expected + [("all-gather", n)] * 2


@pytest.mark.parametrize("mesh", ["1", "data=2"])
def test_what_is_not_tensor_parallel_communicates_nothing(mesh):
    model = shared_model(SMALL_7B, mesh)
    assert collectives(model.compiled(BATCH, LENGTH).as_text()) == []


def test_weights_a_device_shrink_as_the_mesh_grows(monkeypatch):
    # In so small a model, panels for the kernels are mostly padding.
    monkeypatch.setattr(kernels, "instruction_set", lambda: None)
    sizes = []
    for mesh in ("1", "2", "4", "1x8", "8x4"):
        model = MeshModel(SMALL_7B, mesh)
        held = dict.fromkeys(model.plan.mesh.devices.flat, 0)
        for array in jax.tree.leaves(model.params):
            for shard in array.addressable_shards:
                held[shard.device] += shard.data.nbytes
        assert len(set(held.values())) == 1
        sizes.append(held.popitem()[1])
    total = sum(w.nbytes for w in reference.random_weights(SMALL_7B).values())
    assert sizes[0] == total
    for devices, size in zip((2, 4, 8, 32), sizes[1:], strict=True):
        assert total / devices <= size < 1.25 * total / devices


def test_cache_a_device_shrinks_until_it_holds_one_head():
    sizes = []
    for mesh in ("1", "2", "4", "1x8", "8x4"):
        first = shared_model(SMALL_7B, mesh).cache(BATCH, SLOTS)[0]
        sizes.append(sum(a.addressable_shards[-1].data.nbytes for a in first))
    assert [sizes[0] // size for size in sizes] == [1, 2, 4, 4, 4]


@pytest.mark.parametrize(
    ("config", "mesh"), [(SMALL_7B, "1x8"), (SMALL_7B, "7"), (SMALL_HALF_B, "5")]
)
def test_what_stands_in_padded_slots_adds_exactly_nothing(config, mesh):
    model, token_ids = shared_model(config, mesh), random_tokens(config, BATCH, LENGTH)
    plan, rng = model.plan, np.random.default_rng(0)
    before = model.logits(token_ids)
    padding = {axis: plan.axis_source(axis) == PADDING for axis in ("query", "key_value", "mlp")}
    assert padding["query"].any()

    def poisoned(array, axis):
        numbers = whole(array)
        noise = rng.standard_normal(numbers.shape).astype(np.float32)
        return with_numbers(array, np.where(padding[axis], noise, numbers))

    def layer(weights):
        attention, mlp = dict(weights["self_attn"]), dict(weights["mlp"])
        for name, axis in (("q_proj", "query"), ("k_proj", "key_value"), ("v_proj", "key_value")):
            attention[name] = {k: poisoned(a, axis) for k, a in attention[name].items()}
        for name in ("gate_proj", "up_proj"):
            mlp[name] = {k: poisoned(a, "mlp") for k, a in mlp[name].items()}
        return weights | {"self_attn": attention, "mlp": mlp}

    inner = model.params["model"]
    changed = model.params | {"model": inner | {"layers": [layer(w) for w in inner["layers"]]}}
    np.testing.assert_array_equal(model.logits(token_ids, params=changed), before)


@pytest.mark.parametrize("config", [SMALL_7B, SMALL_HALF_B], ids=["7B", "0.5B, tied"])
@pytest.mark.parametrize("mesh", ["1", "3", "2x4", "data=2,model=4"])
def test_every_row_of_the_embedding_is_found_exactly(mesh, config):
    model = shared_model(config, mesh)
    plan, layer = model.plan, model.params["model"]["embed_tokens"]
    (table,) = (w for w in model.runner.model.weights.stored if "embed_tokens" in w.path)
    lookup = jax.shard_map(
        model.runner.ops.embed,
        mesh=plan.mesh,
        in_specs=(plan.spec("length"), {"weight": table.partition_specs()}),
        out_specs=plan.spec("length", "embed"),
        check_vma=False,
    )
    found = jax.jit(lookup)(jnp.arange(config.vocab_size), layer)
    original = reference.random_weights(config)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(found, original)
