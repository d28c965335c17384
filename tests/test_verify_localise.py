# SPDX-License-Identifier: Apache-2.0
"""A fault is found, in the layer and the operation where it is."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_model import whole
from meshwen.errors import MeshwenError
from meshwen.ops.formats import Packed
from meshwen.ops.weight import Weight
from meshwen.verify.faults import (
    negated,
    reversed_sum,
    self_test,
    with_changed_weight,
    without_head,
)
from meshwen.verify.localise import Prober, divergence, first_divergence
from meshwen.verify.operations import (
    EMBEDDING,
    FINAL_NORM,
    LOGITS,
    Operation,
    operations,
    row_parallel,
)
from meshwen.weights.declaration import updated
from tiny_model import TINY
from verify_model import PROMPTS, mesh_run, observed, prober, trace

pytestmark = pytest.mark.usefixtures("unoptimised")
ATTENTION, MLP = "attention output", "MLP output"
IN_LAYERS = [Operation(layer, name) for layer in range(2) for name in (ATTENTION, MLP)]
every_run = pytest.mark.parametrize(
    ("mesh", "numerics"), [("4", "fast"), ("data=2,model=2", "exact")]
)
every_matmul = pytest.mark.parametrize("matmul", IN_LAYERS, ids=str)


@pytest.mark.parametrize(
    ("mesh", "numerics"),
    [("1", "fast"), ("4", "fast"), ("1", "exact"), ("data=2,model=2", "exact")],
)
def test_checksums_change_no_logit_and_copies_agree(mesh, numerics):
    found = trace(mesh, numerics)
    assert found.neutral
    assert found.devices_agree


def test_checksums_of_equal_bits_are_equal_on_every_mesh():
    expected, found = (trace(mesh, "exact") for mesh in ("1", "data=2,model=2"))
    assert first_divergence(expected, found) is None
    assert divergence(expected, found) == [0.0] * 6


def test_fast_meshes_diverge_at_the_first_sum_over_devices():
    assert first_divergence(trace("1"), trace("4")) == Operation(0, ATTENTION)
    assert max(divergence(trace("1"), trace("4"))) < 1e-5


@every_matmul
def test_a_wrong_weight_is_found_where_it_is(matmul):
    run = mesh_run("4")
    weights = run.runner.model.weights
    params = with_changed_weight(run.runner.params, weights, matmul, negated)
    found = prober("4").trace(observed("4").whole, params)
    assert first_divergence(trace("4"), found) == matmul
    assert not found.neutral


@every_matmul
def test_a_sum_in_another_order_is_found_where_it_is(matmul):
    found = Prober(mesh_run("4"), reversed_sum(matmul)).trace(observed("4").whole)
    assert first_divergence(trace("4"), found) == matmul
    assert max(divergence(trace("4"), found)) < 1e-5


@every_run
def test_the_self_test_finds_every_fault(mesh, numerics):
    run = mesh_run(mesh, numerics)
    expected = trace("1" if numerics == "exact" else mesh, numerics)
    sound, first = observed(mesh, numerics).whole, observed("1", numerics).whole
    found = self_test(run, prober(mesh, numerics), expected, sound, first)
    assert [fault.caught for fault in found] == [True] * 3
    if numerics == "exact":
        assert all(fault.breaks == ("logits: not the same bits",) for fault in found)
    else:  # Another order of a sum is no fault there.
        assert [bool(fault.breaks) for fault in found] == [True, False, True]
    assert len({str(fault.operation) for fault in found}) == 3


def test_a_fault_that_is_not_there_is_not_found():
    assert first_divergence(trace("4"), prober("4").trace(observed("4").whole)) is None


@pytest.mark.parametrize(
    ("path", "operation"),
    [
        (("model", "embed_tokens", "weight"), EMBEDDING),
        (("model", "norm", "weight"), FINAL_NORM),
        (("lm_head", "weight"), LOGITS),
    ],
    ids=lambda value: str(value) if isinstance(value, Operation) else "",
)
def test_faults_outside_of_the_layers_are_found(path, operation):
    params = replaced(mesh_run("4").runner.params, path, lambda x: x * 1.5)
    found = prober("4").trace(observed("4").whole, params)
    assert first_divergence(trace("4"), found) == operation
    assert found.devices_agree


def test_a_device_that_is_not_like_the_others_is_noticed():
    def on_one_device(array):
        parts = [shard.data for shard in array.addressable_shards]
        parts[2] = parts[2] * 2
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)

    params = replaced(mesh_run("4").runner.params, ("model", "norm", "weight"), on_one_device)
    assert not prober("4").trace(observed("4").whole, params).devices_agree


def test_logits_that_the_checksums_were_not_taken_of_are_noticed():
    other = observed("4").whole.copy()
    other[0, 0, 0] = np.nextafter(other[0, 0, 0], np.float32(np.inf))
    assert not prober("4").trace(other).neutral


def swapped(array):
    return array[:, np.r_[1, 0, 2 : array.shape[1]]]


def two_signs_changed(array):
    return array.at[:, :2].multiply(-1)


@pytest.mark.parametrize("change", [swapped, two_signs_changed, jnp.negative])
def test_changes_that_a_plain_sum_would_not_see_change_a_checksum(change):
    params = replaced(mesh_run("1").runner.params, ("model", "embed_tokens", "weight"), change)
    found = prober("1").trace(observed("1").whole, params)
    assert first_divergence(trace("1"), found) == EMBEDDING


def test_operations_are_named_in_order():
    weights = mesh_run("1").runner.model.weights
    expected = EMBEDDING, *IN_LAYERS, FINAL_NORM, LOGITS
    assert operations(weights) == trace("1").operations == expected
    assert [operation.key for operation in expected[:2]] == ["embedding", "0:attention output"]
    assert [weight.path for weight in row_parallel(weights).values()][:2] == [
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ]
    assert trace("1").samples.shape == (len(PROMPTS), len(expected) - 1, TINY.hidden_size)


def test_faults_are_what_they_say():
    part = np.array([[1, -3], [2, 0]], np.float32)
    np.testing.assert_array_equal(part * negated(part), [[1, 3], [2, 0]])
    np.testing.assert_array_equal(part * without_head(part, 1), [[0, 0], [2, 0]])


def test_a_changed_weight_leaves_the_original_as_it_was():
    runner = mesh_run("4").runner
    params = runner.params
    weight = params["model"]["layers"][1]["mlp"]["down_proj"]["weight"]
    before = whole(weight)
    other = with_changed_weight(params, runner.model.weights, Operation(1, MLP), negated)
    changed = other["model"]["layers"][1]["mlp"]["down_proj"]["weight"]
    assert (whole(changed) != before).sum() == 1
    np.testing.assert_array_equal(whole(weight), before)
    assert params["model"]["layers"][1]["mlp"]["down_proj"]["weight"] is weight


@partial(jax.tree_util.register_dataclass, data_fields=["pairs"], meta_fields=["shape", "dtype"])
@dataclass(frozen=True)
class Nibbles(Packed):
    """Whole numbers from -8 to 7, two to a byte, each plus 8: no number is a byte's sign."""

    pairs: jax.Array
    shape: tuple[int, int]
    dtype: np.dtype

    format = None

    @classmethod
    def of(cls, numbers):
        low, high = (numbers.T.astype(np.uint8) + 8).reshape(-1, 2).T
        pairs = jnp.asarray(low + 16 * high).reshape(numbers.shape[1], -1)
        return cls(pairs, numbers.shape, np.dtype(np.float32))

    def unpacked(self):
        numbers = jnp.stack([self.pairs % 16, self.pairs // 16], axis=-1)
        return (numbers.astype(self.dtype) - 8).reshape(len(self.pairs), -1).T

    def times(self, factors):
        return Nibbles.of(np.asarray(self.unpacked() * factors))


def changed_nibbles(numbers):
    """What injecting a fault makes of a weight that is stored so."""
    runner, path = mesh_run("1").runner, "model.layers.1.mlp.down_proj.weight"
    params = updated(runner.params, path, lambda _: Weight((Nibbles.of(numbers),), True))
    changed = with_changed_weight(params, runner.model.weights, Operation(1, MLP), negated)
    return changed["model"]["layers"][1]["mlp"]["down_proj"]["weight"].leaf.unpacked()


def test_a_format_changes_its_numbers_however_it_packs_them():
    numbers = np.random.default_rng(0).integers(-7, 8, (6, 4))
    np.testing.assert_array_equal(changed_nibbles(numbers), numbers * negated(numbers))
    with pytest.raises(MeshwenError, match="it holds zeros alone"):
        changed_nibbles(0 * numbers)


def test_a_weight_that_holds_zeros_alone_gets_no_fault_but_an_error():
    runner, path = mesh_run("4").runner, ("model", "layers", "1", "mlp", "down_proj", "weight")
    params = replaced(runner.params, path, jnp.zeros_like)
    with pytest.raises(MeshwenError, match=r"cannot change model\.layers\.1\.mlp\.down_proj"):
        with_changed_weight(params, runner.model.weights, Operation(1, MLP), negated)


def replaced(tree, path, change):
    """The tree with what is stored of one weight changed."""

    def changed(array):
        return jax.device_put(change(array), array.sharding)

    return updated(tree, ".".join(path), lambda weight: jax.tree.map(changed, weight))
