# SPDX-License-Identifier: Apache-2.0
"""The key/value cache: written where each sequence stands, and split over the devices."""

import jax.numpy as jnp
import numpy as np
import pytest

from mesh_model import SMALL_7B
from meshwen.cache.kv_cache import LayerCache, SequenceCache
from meshwen.models.parallel_model import ParallelModel
from meshwen.ops.cpu.xla import XlaOnCpu
from meshwen.parallel.mesh import make_mesh

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
    np.testing.assert_array_equal(found.located()[2], [0, 1, 2])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("start", "length"), [(0, 3), (0, 8), (5, 8)])
@pytest.mark.parametrize("writes", [None, True, False])
def test_a_chunk_of_a_prompt_is_written_into_its_row_alone(writes, start, length, dtype):
    rng = np.random.default_rng(0)
    keys = jnp.asarray(rng.standard_normal((3, 4, 2, 12)), dtype)
    values = jnp.asarray(rng.standard_normal((3, 4, 12, 2)), dtype)
    new_keys = jnp.asarray(rng.standard_normal((1, 4, 2, 3)), jnp.float32)
    new_values = jnp.asarray(rng.standard_normal((1, 4, 3, 2)), jnp.float32)
    flag = None if writes is None else jnp.asarray(writes)
    cache = SequenceCache(LayerCache(keys, values), jnp.int32(1), flag)
    found = cache.written(LayerCache(new_keys, new_values), jnp.asarray([start]), BACKEND)
    if writes is not False:
        keys = keys.at[1, :, :, start : start + 3].set(new_keys[0].astype(dtype))
        values = values.at[1, :, start : start + 3].set(new_values[0].astype(dtype))
    for read, whole in zip(
        found.first(length, LAYOUT), (keys[..., :length], values[:, :, :length]), strict=True
    ):
        np.testing.assert_array_equal(read, whole[1:2])
    np.testing.assert_array_equal(found.located()[2], [1])
    np.testing.assert_array_equal(found.layer.keys, keys)
    np.testing.assert_array_equal(found.layer.values, values)


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
def test_a_device_holds_its_own_heads_of_its_own_rows(mesh, heads):
    model = ParallelModel(SMALL_7B, make_mesh(mesh), jnp.dtype(jnp.bfloat16))
    plan, cache = model.plan, model.empty_cache(4, 10)
    rows = 4 // plan.data_devices
    assert len(cache) == SMALL_7B.num_hidden_layers
    a_device = 0
    for layer in cache:
        for array, part in zip(layer, [(8, 10), (10, 8)], strict=True):
            assert array.dtype == jnp.bfloat16
            assert not np.asarray(array, np.float32).any()
            shards = array.addressable_shards
            assert len(shards) == plan.mesh.size
            assert {s.data.shape for s in shards} == {(rows, heads, *part)}
            a_device += shards[0].data.nbytes
    assert model.token_bytes * rows * 10 == a_device
