# SPDX-License-Identifier: Apache-2.0
"""The bfloat16 product for AVX512-BF16: right, and the same bits whatever else is multiplied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwen import kernels

pytestmark = pytest.mark.skipif(
    not kernels.available(), reason="needs the extra cpu and a CPU with AVX512-BF16"
)

# Every tile, of 1 to 12 rows; one block of rows and several.
ROWS = [*range(1, 14), 24, 25, 37, 130]
# Contracted, columns: whole panels, overlapping ones, fewer columns than a tile, an odd sum.
SHAPES = [(2, 32), (64, 33), (896, 152), (152, 896), (77, 70), (64, 8), (1, 1), (608, 1152)]

product = jax.jit(kernels.bfloat16_product)


def operands(rows: int, contracted: int, columns: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(rows)
    a, b = rng.standard_normal((rows, contracted)), rng.standard_normal((contracted, columns))
    return jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_the_product_is_that_of_float64(rows, shape):
    a, b = operands(rows, *shape)
    found = np.asarray(product(a, b), np.float64)
    a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
    # Each addition rounds once; Higham's bound for a sum in one order.
    bound = shape[0] * 2.0**-24 * (np.abs(a64) @ np.abs(b64))
    assert (np.abs(found - a64 @ b64) <= bound).all()


def test_an_element_has_the_same_bits_whatever_is_multiplied_beside_it():
    a, b = operands(130, 896, 608)
    whole = np.asarray(product(a, b)).view(np.int32)
    for rows in (slice(0, 1), slice(3, 6), slice(7, 15), slice(100, 130)):
        for columns in (slice(0, 32), slice(5, 70), slice(100, 252), slice(0, 608)):
            part = np.asarray(product(a[rows], b[:, columns])).view(np.int32)
            np.testing.assert_array_equal(part, whole[rows, columns])


def test_zeros_behind_a_sum_change_no_bit():
    a, b = operands(9, 100, 64)
    longer = product(jnp.pad(a, ((0, 0), (0, 28))), jnp.pad(b, ((0, 28), (0, 0))))
    np.testing.assert_array_equal(
        np.asarray(longer).view(np.int32), np.asarray(product(a, b)).view(np.int32)
    )


def test_nan_and_infinity_come_through():
    a, b = jnp.ones((2, 4), jnp.bfloat16), jnp.ones((4, 32), jnp.bfloat16)
    y = np.asarray(product(a.at[0, 1].set(jnp.nan), b.at[0, 3].set(jnp.inf)))
    assert np.isnan(y[0]).all()
    assert y[1, 3] == np.inf
    assert (np.delete(y[1], 3) == 4).all()


def test_devices_may_multiply_at_the_same_time():
    a, b = operands(8, 256, 320)
    devices = jax.devices()[:8]
    expected = np.asarray(product(a, b))
    placed = [tuple(jax.device_put(x, device) for x in (a, b)) for device in devices]
    for _ in range(20):
        for found in [product(*pair) for pair in placed]:
            np.testing.assert_array_equal(np.asarray(found), expected)
