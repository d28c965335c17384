# SPDX-License-Identifier: Apache-2.0
"""The key/value cache: written where each sequence stands, and split over the devices."""

import jax.numpy as jnp
import numpy as np
import pytest

from mesh_model import SMALL_7B
from meshwen.kv_cache import LayerCache, cache_bytes_per_token, empty_cache
from meshwen.parallel.mesh import make_mesh
from meshwen.parallel.plan import ParallelPlan


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("starts", [[0, 0, 0], [5, 0, 3], [2, 9, 9]])
@pytest.mark.parametrize("length", [1, 3])
def test_each_row_is_written_at_its_own_start_and_nowhere_else(starts, length, dtype):
    rng = np.random.default_rng(0)

    def draw(dtype, *shape: int) -> np.ndarray:
        return np.array(jnp.asarray(rng.standard_normal(shape), dtype))

    keys, values = draw(jnp.float32, 3, 4, 2, 12), draw(dtype, 3, 4, 12, 2)
    new_keys, new_values = draw(jnp.float32, 3, 4, 2, length), draw(dtype, 3, 4, length, 2)
    cache = LayerCache(jnp.array(keys), jnp.array(values))
    found = cache.write(jnp.asarray(new_keys), jnp.asarray(new_values), jnp.asarray(starts))
    for row, start in enumerate(starts):
        for i in range(length):
            keys[row, :, :, start + i] = new_keys[row, :, :, i]
            values[row, :, start + i, :] = new_values[row, :, i, :]
    assert (found.keys.dtype, found.values.dtype) == (jnp.float32, dtype)
    np.testing.assert_array_equal(found.keys, keys)
    np.testing.assert_array_equal(found.values, values)


def test_what_is_written_is_rounded_to_the_dtype_of_the_cache():
    cache = LayerCache(jnp.zeros((1, 1, 2, 2), jnp.float32), jnp.zeros((1, 1, 2, 2), jnp.bfloat16))
    new = jnp.full((1, 1, 2, 1), 1.01, jnp.float32)
    found = cache.write(new, new.swapaxes(2, 3), jnp.asarray([1]))
    assert found.keys[0, 0].tolist() == [[0, np.float32(1.01)]] * 2
    assert found.values[0, 0].tolist() == [[0, 0], [1.0078125] * 2]


@pytest.mark.parametrize(
    ("mesh", "heads"),
    [("1", 4), ("2", 2), ("4", 1), ("1x8", 1), ("8x4", 1), ("data=2,model=4", 1), ("data=2", 4)],
)
def test_a_device_holds_its_own_heads_of_its_own_rows(mesh, heads):
    plan = ParallelPlan(SMALL_7B, make_mesh(mesh))
    cache = empty_cache(plan, 4, 10, jnp.bfloat16)
    rows = 4 // plan.data_devices
    assert len(cache) == SMALL_7B.num_hidden_layers
    a_device = 0
    for layer in cache:
        parts, dtypes = [(8, 10), (10, 8)], [jnp.float32, jnp.bfloat16]
        for array, part, dtype in zip(layer, parts, dtypes, strict=True):
            assert array.dtype == dtype
            assert not np.asarray(array, np.float32).any()
            shards = array.addressable_shards
            assert len(shards) == plan.mesh.size
            assert {s.data.shape for s in shards} == {(rows, heads, *part)}
            a_device += shards[0].data.nbytes
    assert (
        cache_bytes_per_token(plan.config, plan.heads.local_key_value_heads, jnp.bfloat16)
        * rows
        * 10
        == a_device
    )
