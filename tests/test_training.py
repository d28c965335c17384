# SPDX-License-Identifier: Apache-2.0
"""Gradients on meshes where key/value heads are copied and heads, MLP and vocabulary are padded."""

import functools
from dataclasses import fields, replace
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest

import reference
from mesh_model import SMALL_7B, memory_checkpoint, random_tokens, relative_error
from meshwen.errors import MeshwenError
from meshwen.handoff import forward, global_norm, parallel_model, plain_params
from meshwen.handoff.plain import typed_params
from meshwen.models.parallel_model import ParallelModel
from meshwen.models.qwen2 import Qwen2Config
from meshwen.models.qwen3 import Qwen3Config
from meshwen.parallel.heads import PADDING
from meshwen.parallel.mesh import make_mesh
from meshwen.verify import hlo as verify_hlo
from meshwen.weights.declaration import at
from meshwen.weights.loading import load_params
from needs_kernels import needs_kernels
from test_model import transformers_config

pytestmark = pytest.mark.usefixtures("unoptimised")

# No mesh divides the heads, the vocabulary or, in exact numerics, the MLP.
HEADS_28 = replace(
    SMALL_7B,
    vocab_size=67,
    hidden_size=24,
    intermediate_size=72,
    num_hidden_layers=1,
    layer_types=(),
    name="28 heads",
)
HEADS_14 = replace(
    HEADS_28,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    name="14 heads, tied",
)
QWEN3 = Qwen3Config(
    **{f.name: getattr(HEADS_28, f.name) for f in fields(HEADS_28)} | {"name": "qwen3"}
)
CASES = [
    (HEADS_28, "1", "fast"),
    (HEADS_28, "1x8", "fast"),
    (HEADS_28, "1x32", "fast"),
    pytest.param(HEADS_28, "data=2,model=4", "exact", marks=pytest.mark.slow),
    (HEADS_14, "1", "fast"),
    (HEADS_14, "2x4", "exact"),
    (QWEN3, "data=2,model=4", "fast"),
]
BATCH, LENGTH, STEPS = 4, 6, 3

every_case = pytest.mark.parametrize(
    ("config", "mesh", "numerics"), CASES, ids=lambda value: getattr(value, "name", value)
)


class Trained(NamedTuple):
    """What some steps of an optimiser give; gradients are those of the first."""

    model: ParallelModel
    losses: list[float]
    gradients: dict
    norm: float
    params: dict
    hlo: str


def weights_on(model: ParallelModel) -> dict:
    checkpoint = memory_checkpoint(model.config, reference.random_weights(model.config))
    return plain_params(load_params(checkpoint, model.weights), model.weights)


def cross_entropy(model: ParallelModel, params: dict, token_ids: np.ndarray) -> jax.Array:
    logits = forward(model, params, token_ids)[:, :-1]
    labels = token_ids[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.cache
def trained(config: Qwen2Config, mesh: str, numerics: str) -> Trained:
    model = parallel_model(config, make_mesh(mesh), dtype="float32", numerics=numerics)
    params = weights_on(model)
    optimiser = optax.adamw(1e-2, weight_decay=0.1)
    token_ids = random_tokens(config, BATCH, LENGTH)

    @functools.partial(jax.jit, compiler_options=model.compiler_options)
    def step(params, state):
        loss, gradients = jax.value_and_grad(functools.partial(cross_entropy, model))(
            params, token_ids
        )
        norm = global_norm(model, gradients)
        updates, state = optimiser.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, (loss, gradients, norm)

    state, losses, first = optimiser.init(params), [], None
    step = step.lower(params, state).compile()
    for _ in range(STEPS):
        params, state, found = step(params, state)
        losses.append(float(found[0]))
        first = first or found
    return Trained(model, losses, first[1], float(first[2]), params, step.as_text())


def in_checkpoint(
    model: ParallelModel, tree: dict, tied_difference: float = 0
) -> dict[str, np.ndarray]:
    """By tensor of the checkpoint, as it is there; fails unless copies are equal, padding zero.

    A tied table is two arrays in exact numerics: they may differ by `tied_difference`.
    """
    tensors: dict[str, np.ndarray] = {}
    typed = typed_params(tree, model.weights)
    for layout in model.weights.stored:
        name = layout.declaration.name
        shape = layout.declaration.shape(model.plan.sizes)
        tensor = tensors.setdefault(name, np.full(shape, np.nan, np.float32))
        for i, leaf in enumerate(at(typed, layout.path).leaves):
            array, positions = np.asarray(leaf), layout.positions(i)
            if layout.inputs_first:
                array, positions = array.T, positions[::-1]
            held = np.ix_(*(of_axis != PADDING for of_axis in positions))
            padding = array.copy()
            padding[held] = 0
            assert not padding.any(), f"padding of {name}"
            places = np.ix_(*(of_axis[of_axis != PADDING] for of_axis in positions))
            seen = ~np.isnan(tensor[places])  # A tied table, in the place of the head.
            np.testing.assert_allclose(
                tensor[places][seen], array[held][seen], rtol=0, atol=tied_difference, err_msg=name
            )
            tensor[places] = array[held]
            # Of several copies the last one is kept: all the others are equal to it.
            np.testing.assert_array_equal(tensor[places], array[held], err_msg=name)
    assert not [name for name, tensor in tensors.items() if np.isnan(tensor).any()]
    return tensors


@functools.cache
def derivatives(config: Qwen2Config) -> dict[str, tuple[np.ndarray, float]]:
    """For each tensor a direction, and the loss's derivative along it by float64 differences."""
    weights = {k: w.astype(np.float64) for k, w in reference.random_weights(config).items()}
    token_ids, rng = random_tokens(config, BATCH, LENGTH), np.random.default_rng(1)

    def loss(weights: dict[str, np.ndarray]) -> float:
        total = 0.0
        for row in token_ids.tolist():
            logits = reference.logits(weights, config, row)[:-1]
            logits = logits - logits.max(axis=1, keepdims=True)
            log_z = np.log(np.exp(logits).sum(axis=1))
            total += (log_z - logits[np.arange(LENGTH - 1), row[1:]]).sum()
        return total / (BATCH * (LENGTH - 1))

    found = {}
    for name, weight in weights.items():
        direction = rng.standard_normal(weight.shape)
        step = 1e-6
        ends = [loss(weights | {name: weight + sign * step * direction}) for sign in (1, -1)]
        found[name] = direction, (ends[0] - ends[1]) / (2 * step)
    return found


@every_case
def test_the_gradient_is_that_of_float64_differences(config, mesh, numerics):
    run = trained(config, mesh, numerics)
    gradients = in_checkpoint(run.model, run.gradients)
    assert gradients.keys() == derivatives(config).keys()
    for name, (direction, expected) in derivatives(config).items():
        size = np.linalg.norm(gradients[name]) + 1e-6
        found = np.vdot(gradients[name].astype(np.float64), direction)
        assert abs(found - expected) < 2e-5 * size, name


@every_case
def test_gradients_are_those_of_one_device(config, mesh, numerics):
    run, one = trained(config, mesh, numerics), trained(config, "1", "fast")
    found, expected = (in_checkpoint(r.model, r.gradients) for r in (run, one))
    for name in expected:
        assert relative_error(found[name], expected[name]) < 2e-5, name


def lies_as(found: jax.Array, placed: jax.Array) -> bool:
    return found.sharding.is_equivalent_to(placed.sharding, placed.ndim)


@every_case
def test_steps_of_an_optimiser_keep_copies_equal_padding_zero_and_shardings(config, mesh, numerics):
    run = trained(config, mesh, numerics)
    # XLA compiles the update of each array by itself, and may contract other products in each.
    in_checkpoint(run.model, run.params, tied_difference=1e-6)
    placed = weights_on(run.model)
    for tree in (run.gradients, run.params):
        assert jax.tree.all(jax.tree.map(lies_as, tree, placed))
    np.testing.assert_allclose(run.losses, trained(config, "1", "fast").losses, rtol=1e-5)
    assert run.losses[-1] < run.losses[0]


@every_case
def test_the_norm_counts_each_number_of_the_model_once(config, mesh, numerics):
    run = trained(config, mesh, numerics)
    gradients = in_checkpoint(run.model, run.gradients)
    expected = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in gradients.values()))
    assert run.norm == pytest.approx(expected, rel=1e-5)


def test_training_communicates_as_megatron_does():
    found = verify_hlo.collectives(trained(HEADS_28, "1x8", "fast").hlo)
    in_layers = [one for one in found if one.in_layer]
    # Two sums forward, two backward; of the vocabulary, which stays split, one maximum.
    assert [one.kind for one in in_layers] == ["all-reduce"] * 4 * HEADS_28.num_hidden_layers
    assert {one.kind for one in found} == {"all-reduce"}
    assert max(one.nbytes for one in found if one.reducer == "maximum") < 4 * BATCH * LENGTH + 1


@pytest.mark.torch
def test_gradients_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2ForCausalLM(transformers_config(transformers, HEADS_28)).double()
    weights = reference.random_weights(HEADS_28)
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    token_ids = torch.from_numpy(random_tokens(HEADS_28, BATCH, LENGTH).astype(np.int64))
    loss = theirs(token_ids, labels=token_ids).loss
    loss.backward()
    run = trained(HEADS_28, "1x8", "fast")
    assert run.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    found = in_checkpoint(run.model, run.gradients)
    for name, parameter in theirs.named_parameters():
        assert relative_error(found.pop(name), parameter.grad.numpy()) < 2e-5, name
    assert not found


def test_bfloat16_weights_have_about_the_same_gradient():
    run = trained(HEADS_28, "1", "fast")
    model = parallel_model(HEADS_28, make_mesh("1x8"), dtype="bfloat16")
    params = weights_on(model)
    loss = functools.partial(cross_entropy, model, token_ids=random_tokens(HEADS_28, BATCH, LENGTH))
    gradients = jax.jit(jax.grad(loss), compiler_options=model.compiler_options)(params)
    found, expected = (in_checkpoint(model, gradients), in_checkpoint(run.model, run.gradients))
    for name in expected:
        assert np.linalg.norm(found[name] - expected[name]) < 0.03 * np.linalg.norm(expected[name])


def test_what_has_no_gradient_is_refused():
    int8 = parallel_model(HEADS_28, "1", dtype="float32", quantization="int8")
    with pytest.raises(MeshwenError, match="int8 weights are rounded, so they have no gradient"):
        forward(int8, {}, np.zeros((1, LENGTH), np.int32))


def test_what_is_no_batch_or_are_not_the_weights_is_refused():
    model = parallel_model(HEADS_28, "data=2,model=4", dtype="float32")
    params, ids = weights_on(model), np.zeros((2, LENGTH), np.int32)
    with pytest.raises(MeshwenError, match=r"the batch a multiple of 2, not int32 \[3, 6\]"):
        forward(model, params, np.zeros((3, LENGTH), np.int32))
    with pytest.raises(MeshwenError, match=r"must be integers .* not int32 \[2, 0\]"):
        forward(model, params, ids[:, :0])
    with pytest.raises(MeshwenError, match="1000 tokens are more than the model's context of 256"):
        forward(model, params, np.zeros((2, 1000), np.int32))
    for token in (-1, HEADS_28.vocab_size, 2**40):
        with pytest.raises(MeshwenError, match="input_ids must be from 0 to 6"):
            forward(model, params, np.full((2, LENGTH), token))
    with pytest.raises(MeshwenError, match=r"must be integers .* not float32"):
        forward(model, params, ids.astype(np.float32))
    with pytest.raises(MeshwenError, match=r"not the weights of this model as .*plain_params"):
        forward(model, typed_params(params, model.weights), ids)
    other = parallel_model(HEADS_28, "1x8", dtype="float32")
    with pytest.raises(
        MeshwenError, match=r"lm_head.weight is float32 \[24, 68\], not float32 \[24, 72\]"
    ):
        forward(other, params, ids)


@needs_kernels
def test_a_model_with_kernels_is_refused():
    model = ParallelModel(HEADS_28, make_mesh("1"), np.dtype(np.float32))
    with pytest.raises(MeshwenError, match=r"kernels have no derivative: .* kernels=False"):
        forward(model, {}, np.zeros((1, LENGTH), np.int32))
