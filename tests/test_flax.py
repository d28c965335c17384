# SPDX-License-Identifier: Apache-2.0
"""The linen module gives the reference's logits in and outside of a mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import reference
from checkpoint_writers import write_model
from mesh_model import SMALL_7B, random_tokens, relative_error
from meshwen.errors import MeshwenError
from meshwen.handoff import folded, forward, load_weights, parallel_model
from meshwen.runtime.jax_versions import enable_x64

pytest.importorskip("flax")

from meshwen.flax import FlaxCausalLM, FlaxQwen3ForCausalLM, FlaxQwen25ForCausalLM

pytestmark = pytest.mark.usefixtures("unoptimised")

CONFIG = replace(SMALL_7B, num_hidden_layers=1, layer_types=())
TOKENS = random_tokens(CONFIG, 2, 6)
WHOLE, SPLIT = PartitionSpec(), PartitionSpec(None, None, "X")


def mesh(devices):
    return Mesh(np.array(jax.devices()[:devices]), ("X",))


def module(devices, **attributes):
    attributes = {"axis_name": "X", "param_dtype": "float32", **attributes}
    return FlaxQwen25ForCausalLM(CONFIG, num_devices=devices, **attributes)


def on_each_device(module, out_specs=WHOLE, function="apply", in_specs=None, on=None):
    """As a test harness calls it."""
    return jax.jit(
        jax.shard_map(
            getattr(module, function),
            mesh=on or mesh(module.num_devices),
            in_specs=(module.partition_specs() if in_specs is None else in_specs, WHOLE),
            out_specs=out_specs,
            check_vma=False,
        )
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    weights = reference.random_weights(CONFIG)
    return str(write_model(tmp_path_factory.mktemp("flax"), CONFIG, weights))


@pytest.fixture(scope="module")
def expected():
    weights = reference.random_weights(CONFIG)
    return np.stack([reference.logits(weights, CONFIG, list(row)) for row in TOKENS])


def close(found, expected):
    """Within float32's rounding of a layer's sums."""
    return found.shape == expected.shape and relative_error(np.asarray(found), expected) < 1e-5


def assert_close(found, expected):
    assert close(found, np.asarray(expected))


@pytest.mark.parametrize("devices", [1, 8])
def test_logits_are_the_references_on_a_mesh_and_outside_of_it(devices, checkpoint, expected):
    model = FlaxQwen25ForCausalLM.for_model(
        checkpoint, axis_name="X", num_devices=devices, param_dtype=jnp.float32
    )
    variables = model.load_parameters(checkpoint, mesh(devices))
    assert close(on_each_device(model)(variables, TOKENS), expected)
    outside = jax.device_put(variables, jax.devices()[0])
    assert close(jax.jit(model.apply)(outside, TOKENS), expected)


def test_a_caller_with_64_bits_gets_the_same_logits(checkpoint, expected):
    model = module(8)
    variables = model.load_parameters(checkpoint, mesh(8))
    with enable_x64(True):
        found = on_each_device(model)(variables, TOKENS.astype(np.int64))
    assert found.dtype == jnp.float32
    assert close(found, expected)


def test_a_device_may_give_its_part_of_the_vocabulary(checkpoint, expected):
    model = module(8, gather_logits=False)
    variables = model.load_parameters(checkpoint, mesh(8))
    found = on_each_device(model, SPLIT)(variables, TOKENS)
    assert close(found[..., : CONFIG.vocab_size], expected)
    assert (found[..., CONFIG.vocab_size :] == 0).all()
    outside = jax.jit(model.apply)(jax.device_put(variables, jax.devices()[0]), TOKENS)
    assert outside.shape == found.shape
    assert close(outside[..., : CONFIG.vocab_size], expected)


def test_a_device_asks_for_its_number_only_where_nobody_tells_it(checkpoint, expected):
    model = module(8)
    variables = model.load_parameters(checkpoint, mesh(8))
    told = on_each_device(model)
    assert "partition_id" not in told.lower(variables, TOKENS).as_text()
    specs = {"params": model.partition_specs()["params"]}
    asks = on_each_device(model, in_specs=specs)
    variables = {"params": variables["params"]}
    assert "partition_id" in asks.lower(variables, TOKENS).as_text()
    assert close(asks(variables, TOKENS), expected)


def test_weights_of_another_dtype_are_multiplied_in_it(checkpoint, expected):
    model = module(2)
    variables = model.load_parameters(checkpoint, mesh(2))
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, variables
    )
    found = on_each_device(model)(half, TOKENS)
    assert 1e-4 < relative_error(np.asarray(found), expected) < 3e-2


def test_init_gives_the_same_weights_on_a_mesh_and_outside_of_it():
    one, model, key = module(1), module(8), jax.random.key(3)
    init, apply = jax.jit(model.init), jax.jit(model.apply)
    whole = init(key, TOKENS)
    split = on_each_device(model, model.partition_specs(), "init", WHOLE)(key, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, whole, split)
    alone = jax.jit(one.apply)(jax.jit(one.init)(key, TOKENS), TOKENS)
    assert close(apply(whole, TOKENS), np.asarray(alone))
    other = init(jax.random.key(4), TOKENS)
    assert not close(apply(other, TOKENS), np.asarray(alone))


def test_shapes_are_those_of_loaded_weights():
    model = module(8, param_dtype="bfloat16")
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    loaded = model.load_parameters(None, mesh(8))

    def alike(shape, array, spec):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert array.sharding.is_equivalent_to(NamedSharding(mesh(8), spec), array.ndim)

    jax.tree.map(alike, shapes, loaded, model.partition_specs())


@pytest.mark.parametrize("outside", [False, True])
def test_folded_gradients_are_the_models(outside):
    model, weights = module(8), parallel_model(CONFIG, mesh(8), dtype="float32")
    variables = model.load_parameters(None, mesh(8))
    if outside:
        variables = jax.device_put(variables, jax.devices()[0])
    apply = model.apply if outside else on_each_device(model)
    cotangent = np.random.default_rng(0).normal(size=(*TOKENS.shape, CONFIG.vocab_size))

    def gradients(logits, params):
        return jax.jit(jax.grad(lambda params: (logits(params) * cotangent).sum()))(params)

    given = gradients(
        lambda params: apply({**variables, "params": params}, TOKENS), variables["params"]
    )
    params = load_weights(weights, None)
    expected = gradients(lambda params: forward(weights, params, TOKENS), params)
    found = model.folded({"params": given, "constants": variables["constants"]})
    assert found["constants"] is variables["constants"]
    jax.tree.map(assert_close, found["params"], expected)
    jax.tree.map(assert_close, jax.jit(model.folded)({"params": given})["params"], expected)
    for name in ("k_proj", "v_proj", "o_proj"):
        pair = (tree["model"]["layers"][0]["self_attn"][name] for tree in (given, expected))
        assert not close(*(np.asarray(one["weight"]) for one in pair)), name


def test_the_axes_of_a_mesh_may_be_explicit(checkpoint, expected):
    explicit = jax.make_mesh((8,), ("X",), axis_types=(AxisType.Explicit,))
    model = module(8)
    variables = model.load_parameters(checkpoint, explicit)
    assert close(on_each_device(model, on=explicit)(variables, TOKENS), expected)
    weights = parallel_model(CONFIG, mesh(8), dtype="float32")
    found = model.folded({"params": variables["params"]})["params"]
    params = load_weights(weights, checkpoint)
    jax.tree.map(assert_close, found, folded(weights, params))


def test_a_mesh_may_have_further_axes(checkpoint, expected):
    model = module(4)
    devices = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("batch", "X"))
    variables = model.load_parameters(checkpoint, devices)
    rows = PartitionSpec("batch")
    apply = jax.shard_map(
        model.apply,
        mesh=devices,
        in_specs=(model.partition_specs(), rows),
        out_specs=rows,
        check_vma=False,
    )
    assert close(jax.jit(apply)(variables, TOKENS), expected)


def test_the_number_of_devices_may_be_numpys():
    assert module(np.int64(2)) == module(2)
    assert type(module(np.int64(2)).num_devices) is int


def test_what_does_not_fit_is_refused():
    with pytest.raises(MeshwenError, match="is a qwen2 model, not one for FlaxQwen3ForCausalLM"):
        FlaxQwen3ForCausalLM(CONFIG)
    with pytest.raises(MeshwenError, match="num_devices must be from 1 on, not 0"):
        FlaxCausalLM(CONFIG, num_devices=0)
    with pytest.raises(MeshwenError, match="num_devices must be a whole number, not True"):
        FlaxCausalLM(CONFIG, num_devices=True)
    with pytest.raises(MeshwenError, match=r"axis 'X' must be of size 4; .* X of 8"):
        module(4).load_parameters(None, mesh(8))
    with pytest.raises(MeshwenError, match=r"axis 'X' must be of size 1; .* X of 8"):
        module(1).load_parameters(None, mesh(8))
    with pytest.raises(MeshwenError, match=r"gradients must be .*, not with the keys \['model'\]"):
        module(1).folded({"model": {}})
    with pytest.raises(MeshwenError, match=r"must be integers .* not float32 \[2, 6\]"):
        module(1).init(jax.random.key(0), TOKENS.astype(np.float32))
    model = module(4)
    apply = jax.shard_map(
        model.apply, mesh=mesh(8), in_specs=(WHOLE, WHOLE), out_specs=WHOLE, check_vma=False
    )
    with pytest.raises(MeshwenError, match="axis 'X' has 8 devices, but the module is for 4"):
        apply(jax.device_get(model.load_parameters(None, mesh(4))), TOKENS)
