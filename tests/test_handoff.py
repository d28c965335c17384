# SPDX-License-Identifier: Apache-2.0
"""Programs for other stacks: what they compute, and of which operations they consist."""

import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

import reference
from mesh_model import SMALL_HALF_B, memory_checkpoint, random_tokens, relative_error
from meshwen.common.choices import PROGRAMS
from meshwen.errors import MeshwenError
from meshwen.handoff import (
    load_weights,
    parallel_model,
    plain_params,
    program,
    typed_params,
)
from meshwen.handoff.golden import run
from meshwen.handoff.plain import names
from meshwen.handoff.portable import OPERATIONS
from meshwen.parallel.mesh import make_mesh
from meshwen.weights.loading import load_params
from tiny_model import TINY

pytestmark = pytest.mark.usefixtures("unoptimised")

LENGTHS = (5, 3)  # of the prompts; shorter than the window of TINY's second layer, and not


def sizes(name):
    given = {"batch": 2, "tokens": 5, "length": 12}
    given.pop({"logits": "length", "decode": "tokens"}.get(name), None)
    return given


@cache
def foreign_mesh(data=1):
    """Eight devices, as another stack names their axes."""
    if data == 1:
        return Mesh(np.array(make_mesh("8").devices), ("X",))
    return Mesh(np.array(make_mesh("8").devices).reshape(data, -1), ("batch", "X"))


@cache
def loaded(config, data=1, numerics="fast", dtype="float32"):
    """A model on eight devices, and its plain weights."""
    axes = ("batch",) if data > 1 else None
    model = parallel_model(
        config, foreign_mesh(data), data_axes=axes, numerics=numerics, dtype=dtype
    )
    checkpoint = memory_checkpoint(config, reference.random_weights(config))
    return model, plain_params(load_params(checkpoint, model.weights), model.weights)


def generated(config, profile, data=1, output="logits"):
    """Of two prompts and a decode step behind them: what prefill and decode give."""
    model, params = loaded(config, data)
    ids = random_tokens(config, 2, 6)
    lengths = LENGTHS if profile == "native" else (5, 5)  # All at one position.
    prefill = program("prefill", model, profile=profile, output=output, **sizes("prefill"))
    decode = program("decode", model, profile=profile, output=output, **sizes("decode"))
    empty = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), prefill.arguments["cache"])
    inputs = {"cache": empty, "input_ids": ids[:, :5], "lengths": np.int32(lengths)}
    following = {"input_ids": ids[:, 5:], "positions": np.int32(lengths)}
    if profile == "portable":
        device = {"device": np.arange(model.plan.model_devices, dtype=np.int32)}
        last = {"positions": np.arange(5, dtype=np.int32), "last": np.int32([4])}
        inputs = device | {name: inputs[name] for name in ("cache", "input_ids")} | last
        following = {"input_ids": ids[:, 5:], "position": np.int32([5])}
    first = run(prefill, params, inputs)
    cache = {"cache": jax.tree.map(np.asarray, first["cache"])}
    given = {n: (inputs | cache | following)[n] for n in list(decode.arguments)[1:]}
    return np.asarray(first[output]), np.asarray(run(decode, params, given)[output])


def expected(config, lengths):
    """The same in float64."""
    ids, weights = random_tokens(config, 2, 6), reference.random_weights(config)
    first, second = [], []
    for row, length in zip(ids, lengths, strict=True):
        sequence = np.concatenate([row[:length], row[5:]])
        logits = reference.logits(weights, config, sequence.tolist())
        first.append(logits[length - 1])
        second.append(logits[length])
    return np.stack(first), np.stack(second)


@pytest.mark.parametrize(
    ("config", "data"), [(TINY, 1), (SMALL_HALF_B, 2)], ids=["tiny, X=8", "0.5B, batch=2 X=4"]
)
@pytest.mark.parametrize("profile", ["native", "portable"])
def test_a_prompt_and_a_decode_step_give_what_the_reference_gives(config, data, profile):
    lengths = LENGTHS if profile == "native" else (5, 5)
    wanted = expected(config, lengths)
    for found, reference_logits in zip(generated(config, profile, data), wanted, strict=True):
        assert relative_error(found[:, : config.vocab_size], reference_logits) < 1e-5
        assert not found[:, config.vocab_size :].any()
    tokens = generated(config, profile, data, output="tokens")
    assert [row.tolist() for row in tokens] == [w.argmax(axis=1).tolist() for w in wanted]


@pytest.mark.parametrize("profile", ["native", "portable"])
def test_logits_of_whole_sequences_are_the_references(profile):
    model, params = loaded(TINY)
    ids = random_tokens(TINY, 2, 5)
    step = program("logits", model, profile=profile, **sizes("logits"))
    device = {"device": np.arange(8, dtype=np.int32)} if profile == "portable" else {}
    found = np.asarray(run(step, params, device | {"input_ids": ids})["logits"])
    weights = reference.random_weights(TINY)
    wanted = np.stack([reference.logits(weights, TINY, row.tolist()) for row in ids])
    assert relative_error(found[..., : TINY.vocab_size], wanted) < 1e-5


def operations(text):
    named = set(re.findall(r"stablehlo\.([a-z_]+)[ (<\"]", text))
    return named - {"channel_handle", "mesh", "return"}  # Attributes, and the ends of regions.


@pytest.mark.parametrize("composites", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_portable_programs_consist_of_the_profiles_operations(name, composites, quantization):
    model = parallel_model(
        SMALL_HALF_B,
        AbstractMesh((2, 4), ("batch", "X")),
        data_axes=("batch",),
        dtype="bfloat16",
        quantization=quantization,
    )
    for output in ("logits", "tokens")[: 1 if name == "logits" else 2]:
        step = program(
            name, model, profile="portable", composites=composites, output=output, **sizes(name)
        )
        found = operations(step.exported().mlir_module())
        assert found <= OPERATIONS
        assert ("composite" in found) == composites
        assert {"dot_general", "all_reduce"} <= found
        assert ("scatter" in found) == (name != "logits")


def test_the_native_profile_has_operations_that_the_portable_one_has_not():
    model = parallel_model(TINY, AbstractMesh((8,), ("X",)))
    assert "partition_id" in operations(program("logits", model).exported().mlir_module())


def test_composites_have_the_names_and_attributes_that_a_compiler_looks_for():
    model = parallel_model(TINY, AbstractMesh((8,), ("X",)))
    text = program("decode", model, profile="portable", composites=True).lower().as_text()
    norm, *_ = re.findall(r'composite "tenstorrent.rms_norm".*', text)
    assert re.search(r"epsilon = .*E-7", norm)
    assert re.search(r"normalized_shape = dense<32> : tensor<1xi64>", norm)
    attention, *_ = re.findall(r'composite "tenstorrent.scaled_dot_product_attention".*', text)
    assert "is_causal = false" in attention
    assert "scale = 1" in attention


def test_the_cache_is_written_by_one_scatter_at_an_argument():
    model = parallel_model(TINY, AbstractMesh((8,), ("X",)))
    decode = program("decode", model, profile="portable", **sizes("decode"))
    cache = decode.arguments["cache"][0]["keys"]
    assert cache.shape == (2, 8 * model.plan.heads.local_key_value_heads, 12, 8)
    # Of keys and of values; the layers are one function.
    assert decode.lower().as_text().count('"stablehlo.scatter"') == 2


def test_a_program_of_a_mesh_without_devices_lowers_with_its_shardings():
    model = parallel_model("qwen2.5-7b", AbstractMesh((8,), ("X",)), dtype="bfloat16")
    decode = program("decode", model, profile="portable", length=64)
    params, device, cache, input_ids, position = decode.in_specs
    assert params["model"]["embed_tokens"]["weight"] == PartitionSpec("X", None)
    projection = params["model"]["layers"][27]["self_attn"]["q_proj"]["weight"]
    assert projection == PartitionSpec(None, "X")
    assert device == PartitionSpec("X")
    assert (input_ids, position) == (PartitionSpec(None), PartitionSpec())
    assert cache[0] == dict.fromkeys(("keys", "values"), PartitionSpec(None, "X"))
    text = decode.lower("tpu").as_text()
    assert "num_partitions = 8" in text
    assert 'sdy.mesh @mesh = <["X"=8]>' in text


def test_a_callers_64_bit_types_change_nothing():
    model, params = loaded(TINY)
    ids = random_tokens(TINY, 2, 5)
    step = program("logits", model, **sizes("logits"))
    wanted = np.asarray(run(step, params, {"input_ids": ids})["logits"])
    with jax.enable_x64(True):
        found = step.jitted()(params, jnp.asarray(ids, jnp.int64))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(found), wanted)


@pytest.mark.parametrize("numerics", ["fast", "exact"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_plain_weights_are_arrays_of_the_declared_shapes_and_lead_back(numerics, quantization):
    model = replace(loaded(TINY)[0], numerics=numerics, quantization=quantization)
    checkpoint = memory_checkpoint(TINY, reference.random_weights(TINY))
    params = load_params(checkpoint, model.weights)
    plain = plain_params(params, model.weights)
    shapes = dict(names(program("logits", model).arguments["params"]))
    for name, array in names(plain):
        assert type(array).__module__.startswith("jaxlib")
        assert (array.shape, array.dtype) == (shapes[name].shape, shapes[name].dtype), name
        assert array.sharding.is_equivalent_to(shapes[name].sharding, array.ndim), name
    assert len(shapes) == len(list(names(plain)))
    again = typed_params(plain, model.weights)
    assert jax.tree.structure(again) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "train"}, "program must be logits, prefill or decode, not 'train'"),
        ({"profile": "fast"}, "profile must be native or portable"),
        ({"output": "text"}, "output must be logits or tokens"),
        ({"batch": 0}, "batch must be a whole number from 1 to 2147483647, not 0"),
        ({"batch": 3}, "batch must be a multiple of 2, the devices that split it, not 3"),
        ({"tokens": True}, "tokens must be a whole number from 1 to 2147483647, not True"),
        ({"tokens": 40, "length": 12}, r"tokens \(40\) must be at most length"),
        ({"length": 5000}, "5000 positions are more than the model's context of 1100"),
        ({"name": "logits", "tokens": 5000}, "5000 positions are more than"),
        ({"batch": 10**20}, "batch must be a whole number from 1 to 2147483647"),
        ({"name": "decode", "tokens": 5}, "the decode program has no tokens: leave it out"),
        ({"name": "logits", "length": 5}, "the logits program has no length: leave it out"),
        ({"name": "logits", "output": "tokens"}, "the logits program has no output"),
        ({"composites": True}, "composites are of the portable profile"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    model, _ = loaded(SMALL_HALF_B if "batch" in changes else TINY, 2 if "batch" in changes else 1)
    arguments = {"name": "prefill"} | changes
    arguments = sizes(arguments["name"]) | arguments
    with pytest.raises(MeshwenError, match=message):
        program(arguments.pop("name"), model, **arguments)


def test_the_portable_profile_has_no_exact_numerics():
    model = parallel_model(TINY, AbstractMesh((8,), ("X",)), numerics="exact")
    with pytest.raises(MeshwenError, match="portable profile has fast numerics alone"):
        program("decode", model, profile="portable")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": "1x8", "data_axes": "X"}, "data_axes name axes of a JAX mesh; '1x8' names its"),
        ({"mesh": make_mesh("8"), "data_axes": ("model", "model")}, "name an axis twice"),
        ({"mesh": 3.5}, "mesh must be text"),
        ({"dtyp": "float32"}, "there is no option 'dtyp' here; there are dtype, numerics, quant"),
        ({"max_num_seqs": 3}, "there is no option 'max_num_seqs' here"),
    ],
)
def test_options_that_change_nothing_are_refused(change, message):
    with pytest.raises(MeshwenError, match=message):
        parallel_model(TINY, **change)


def test_a_mesh_without_devices_has_no_weights_and_no_exact_numerics():
    mesh = AbstractMesh((8,), ("X",))
    with pytest.raises(MeshwenError, match="a mesh without devices holds no weights"):
        load_weights(parallel_model(TINY, mesh), None)
    with pytest.raises(MeshwenError, match="exact numerics are for the devices of a mesh"):
        program("decode", parallel_model(TINY, mesh, numerics="exact"))
    with pytest.raises(MeshwenError, match="platform must be cpu, tpu, cuda or rocm"):
        program("decode", parallel_model(TINY, mesh)).lower("metal")


def test_axes_that_the_mesh_does_not_have_are_refused():
    with pytest.raises(MeshwenError, match="the mesh has no axis 'Y'; its axes are X"):
        parallel_model(TINY, AbstractMesh((8,), ("X",)), data_axes="Y")
