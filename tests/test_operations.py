# SPDX-License-Identifier: Apache-2.0
"""Linear layers with a bias: on every mesh the sum of one device, and the bias added once."""

import functools

import jax
import numpy as np
import pytest

from mesh_model import SMALL_7B, memory_checkpoint, relative_error
from meshwen.models.decoder_weights import bias, projection
from meshwen.models.parallel_model import ParallelModel
from meshwen.parallel.mesh import make_mesh
from meshwen.weights.declaration import Part
from meshwen.weights.layout import WeightTable
from meshwen.weights.loading import load_params

# Of each contraction: its layer's axes, and those of what it gives.
LAYERS = {
    "column": (("mlp", "embed"), "mlp"),
    "row": (("embed", "mlp"), "embed"),
    "logits": (("vocab", "embed"), "vocab"),
}
ROWS = 5

every_layer = pytest.mark.parametrize("name", LAYERS)


@functools.cache
def numbers(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs [rows, in], a weight [out, in] and a bias of the size of what they give."""
    outputs, inputs = (SMALL_7B.sizes[axis] for axis in LAYERS[name][0])
    draw = np.random.default_rng(0).standard_normal
    x, weight, added = draw((ROWS, inputs)), draw((outputs, inputs)), 10 * draw(outputs)
    return tuple(array.astype(np.float32) for array in (x, weight, added))


def result(name: str, mesh: str, numerics: str, *, biased: bool = True) -> np.ndarray:
    """What the contraction gives for the layer, on a mesh."""
    (output, inputs), given = LAYERS[name]
    x, weight, added = numbers(name)
    model = ParallelModel(SMALL_7B, make_mesh(mesh), np.dtype(np.float32), numerics)
    declared = [projection("layer", output, inputs, Part.MLP)]
    tensors = {"layer.weight": weight}
    if biased:
        declared.append(bias("layer", output, Part.MLP))
        tensors["layer.bias"] = added
    format = model.backend.format(None)
    table = WeightTable(model.plan, tuple(declared), model.dtype, format)
    layer = load_params(memory_checkpoint(SMALL_7B, tensors), table)["layer"]
    padding = model.plan.axis_length(inputs) - x.shape[1]
    mapped = jax.shard_map(
        getattr(model.ops, name),
        mesh=model.mesh,
        in_specs=(model.plan.spec("length", inputs), table.partition_specs()["layer"]),
        out_specs=model.plan.spec("length", given),
        check_vma=False,
    )
    options = model.backend.compiler_options(model.ops.numerics.ordered)
    found = jax.jit(mapped, compiler_options=options)(np.pad(x, ((0, 0), (0, padding))), layer)
    return np.asarray(found)[:, : len(added)]


@every_layer
@pytest.mark.parametrize("mesh", ["1", "3", "data=2,model=4"])
def test_a_bias_is_added_once_on_every_mesh(name, mesh):
    x, weight, added = numbers(name)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64) + added
    assert relative_error(result(name, mesh, "fast"), expected) < 1e-6


@every_layer
def test_a_bias_is_added_in_one_rounding_on_every_mesh_in_exact_numerics(name):
    expected = result(name, "1", "exact", biased=False) + numbers(name)[2]
    for mesh in ("1", "1x8"):
        np.testing.assert_array_equal(result(name, mesh, "exact"), expected)
