# SPDX-License-Identifier: Apache-2.0
"""Weights from the devices: the checkpoint's bits again, from every mesh, dtype and format."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from checkpoint_writers import same_bits
from mesh_model import SMALL_7B, SMALL_HALF_B, memory_checkpoint
from meshwen.checkpoints import Checkpoint
from meshwen.models.parallel_model import ParallelModel
from meshwen.ops.cpu.panels import INT8_PANELS
from meshwen.ops.quant.int8 import INT8, quantized, requantizable
from meshwen.parallel.mesh import make_mesh
from meshwen.weights.layout import WeightTable
from meshwen.weights.loading import load_params
from meshwen.weights.saving import held_tensors
from test_loading import BFLOAT16, MESHES, ODD, random_bits

pytestmark = pytest.mark.usefixtures("unoptimised")
FLOAT32 = np.dtype(np.float32)


def weight_table(config, mesh, dtype, numerics="fast", quantization=None) -> WeightTable:
    return ParallelModel(config, make_mesh(mesh), dtype, numerics, quantization).weights


def held_arrays(opened: Checkpoint, table: WeightTable) -> dict[str, np.ndarray]:
    tensors = held_tensors(load_params(opened, table), table)
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    for name, array in arrays.items():
        tensor = tensors[name]
        assert (tensor.name, tensor.shape, tensor.dtype, tensor.nbytes) == (
            name,
            array.shape,
            array.dtype,
            array.nbytes,
        )
    return arrays


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert same_bits(array, expected[name]), name


@pytest.mark.parametrize("packed", [True, False], ids=["format of the back end", "arrays"])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_tensors_of_the_checkpoint_bit_for_bit(mesh, packed):
    """Heads are padded and copied; vocabulary and MLP divide by no mesh."""
    dtype = FLOAT32 if mesh in ("3", "2x4") else BFLOAT16
    weights = random_bits(ODD, dtype)
    table = weight_table(ODD, mesh, dtype)
    table = table if packed else replace(table, format=None)
    assert_same(held_arrays(memory_checkpoint(ODD, weights), table), weights)


@pytest.mark.parametrize("mesh", ["1", "2x4", "1x32"])
@pytest.mark.parametrize("config", [SMALL_7B, SMALL_HALF_B], ids=["7B", "0.5B, tied"])
def test_leaves_of_exact_numerics_are_put_together(config, mesh):
    weights = reference.random_weights(config)
    table = weight_table(config, mesh, FLOAT32, "exact")
    assert_same(held_arrays(memory_checkpoint(config, weights), table), weights)


def test_a_part_of_a_tensor_is_read():
    table = weight_table(ODD, "3", FLOAT32)
    weights = random_bits(ODD, FLOAT32)
    tensors = held_tensors(load_params(memory_checkpoint(ODD, weights), table), table)
    name = "model.layers.0.mlp.up_proj.weight"
    index = (slice(5, 9), slice(2, None))
    assert same_bits(np.ascontiguousarray(tensors[name].read(index)), weights[name][index].copy())


@pytest.mark.parametrize(
    ("mesh", "numerics", "format"),
    [("1", "fast", INT8_PANELS), ("3", "fast", INT8), ("1x8", "exact", INT8_PANELS)],
    ids=str,
)
def test_int8_gives_numbers_that_are_quantised_to_the_same_bits(mesh, numerics, format):
    """Of tied embeddings too: the table is written, and the head is quantised of it."""
    table = weight_table(SMALL_HALF_B, mesh, BFLOAT16, numerics, "int8")
    table = replace(table, format=format)
    weights = reference.random_weights(SMALL_HALF_B)
    weights = {name: array.astype(BFLOAT16) for name, array in weights.items()}
    params = load_params(memory_checkpoint(SMALL_HALF_B, weights), table)
    held = {name: tensor.read() for name, tensor in held_tensors(params, table).items()}
    assert {array.dtype for array in held.values()} == {FLOAT32}
    again = load_params(memory_checkpoint(SMALL_HALF_B, held), table)
    for found, expected in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        assert same_bits(np.asarray(found), np.asarray(expected))


def test_every_scale_of_int8_is_found_again():
    """The largest number of a group takes every place between two scales, in steps of 1/16."""
    scales = np.arange(128, 256) / 128  # Every bfloat16 from 1 to 2.
    rng = np.random.default_rng(0)
    largest = (scales[:, None] - np.arange(16) / 16 / 128).reshape(-1, 1) * 127
    groups = np.concatenate([largest, rng.uniform(-1, 1, (len(largest), 31)) * largest], axis=1)
    for exponent in (-100, -7, 90):
        values, found = quantized(jnp.asarray(groups * 2.0**exponent, jnp.float32))
        short = np.abs(np.asarray(values)).max(axis=1) == 126
        assert 0 < short.sum() < len(short)
        again, scales_again = quantized(requantizable(values, found))
        np.testing.assert_array_equal(again, values)
        np.testing.assert_array_equal(scales_again, found)
