# SPDX-License-Identifier: Apache-2.0
"""The KV cache: rows written where each sequence stands, blocks split over the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_model import SMALL_7B, shared_model
from meshwen.cache.kv_cache import LayerCache
from meshwen.models.parallel_model import ParallelModel
from meshwen.ops.cpu.xla import XlaOnCpu
from meshwen.parallel.mesh import make_mesh
from tiny_model import ONE_LAYER

BACKEND = XlaOnCpu()
LAYOUT = BACKEND.cache_layout


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("starts", [[0, 0, 0], [5, 0, 3], [2, 9, 9]])
@pytest.mark.parametrize("length", [1, 3])
def test_each_row_is_written_at_its_own_start_and_nowhere_else(starts, length, dtype):
    rng = np.random.default_rng(0)

    def draw(dtype, *shape: int) -> np.ndarray:
        return np.array(jnp.asarray(rng.standard_normal(shape), dtype))

    keys, values = draw(dtype, 3, 4, 2, 12), draw(dtype, 3, 4, 12, 2)
    new_keys, new_values = draw(dtype, 3, 4, 2, length), draw(dtype, 3, 4, length, 2)
    cache = LayerCache(jnp.array(keys), jnp.array(values))
    new = LayerCache(jnp.asarray(new_keys), jnp.asarray(new_values))
    found = cache.written(new, jnp.asarray(starts), BACKEND)
    for row, start in enumerate(starts):
        for i in range(length):
            keys[row, :, :, start + i] = new_keys[row, :, :, i]
            values[row, :, start + i, :] = new_values[row, :, i, :]
    assert found.keys.dtype == found.values.dtype == dtype
    np.testing.assert_array_equal(found.keys, keys)
    np.testing.assert_array_equal(found.values, values)
    for read, whole in zip(
        found.first(11, LAYOUT), (keys[..., :11], values[:, :, :11]), strict=True
    ):
        np.testing.assert_array_equal(read, whole)


def test_keys_and_values_as_they_are_computed_become_rows_in_the_order_of_the_layout():
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 3, 5, 4, 2))  # BSKH
    found = LayerCache.of(jnp.asarray(keys), jnp.asarray(values), LAYOUT)
    np.testing.assert_array_equal(found.keys, np.einsum("BSKH->BKHS", jnp.asarray(keys)))
    np.testing.assert_array_equal(found.values, np.einsum("BSKH->BKSH", jnp.asarray(values)))
    assert found.length(LAYOUT) == 5


def test_what_is_written_is_rounded_to_the_dtype_of_the_cache():
    cache = LayerCache(*(jnp.zeros((1, 1, 2, 2), jnp.bfloat16) for _ in range(2)))
    new = jnp.full((1, 1, 2, 1), 1.01, jnp.float32)
    found = cache.written(LayerCache(new, new.swapaxes(2, 3)), jnp.asarray([1]), BACKEND)
    assert found.keys[0, 0].tolist() == [[0, 1.0078125]] * 2
    assert found.values[0, 0].tolist() == [[0, 0], [1.0078125] * 2]


@pytest.mark.parametrize(
    ("mesh", "heads"),
    [("1", 4), ("2", 2), ("4", 1), ("1x8", 1), ("8x4", 1), ("data=2,model=4", 1), ("data=2", 4)],
)
def test_a_device_holds_its_own_heads_of_the_blocks_of_its_part(mesh, heads):
    model = ParallelModel(SMALL_7B, make_mesh(mesh), jnp.dtype(jnp.bfloat16))
    cache, size = model.empty_blocks(3), model.backend.block_size
    held = model.backend.block_head_dim(SMALL_7B.head_dim)
    assert len(cache) == SMALL_7B.num_hidden_layers
    a_device = 0
    for layer in cache:
        for array, axes in zip(layer, _axes(model.backend), strict=True):
            shards = array.addressable_shards
            assert len(shards) == model.mesh.size
            sizes = {"B": 3, "K": heads, "S": size, "H": held}
            assert {s.data.shape for s in shards} == {tuple(sizes[axis] for axis in axes)}
            a_device += shards[0].data.nbytes
    assert model.token_bytes * size * 3 == a_device


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_blocks_are_copied_within_each_part_bit_for_bit(dtype):
    runner = shared_model(ONE_LAYER, "data=2", dtype).runner
    rng = np.random.default_rng(0)

    def filled(array):
        bits = rng.bytes(array.nbytes)  # NaN too.
        return jax.device_put(np.frombuffer(bits, array.dtype).reshape(array.shape), array.sharding)

    cache = jax.tree.map(filled, runner.empty_blocks(4))
    before = [np.array(array).view(np.uint8) for array in jax.tree.leaves(cache)]
    # Of the second part one block less: the null block onto itself.
    after = runner.copied_blocks(cache, np.array([1, 3, 2, 0]), np.array([2, 1, 3, 0]))
    for old, new in zip(before, jax.tree.leaves(after), strict=True):
        order = [0, 3, 1, 3, 4, 5, 6, 6]
        np.testing.assert_array_equal(np.asarray(new).view(np.uint8), old[order])


def _axes(backend) -> tuple[str, str]:
    return backend.cache_layout.keys, backend.cache_layout.values
