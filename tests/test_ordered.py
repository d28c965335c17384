# SPDX-License-Identifier: Apache-2.0
"""Sums in one order of additions, as a back end has them that needs no more than XLA."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwen.ops import ordered
from meshwen.ops.backend import Backend

BACKEND = Backend()
RUNS, ROWS, COLUMNS = 11, 24, 130

every_dtype = pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["f32", "bf16"])


def same_bits(found: jax.Array, expected: np.ndarray) -> bool:
    bits = np.asarray(found).view(np.int32), expected.view(np.int32)
    return expected.dtype == np.float32 and np.array_equal(*bits)


def numpy_tree(terms: np.ndarray) -> np.ndarray:
    """The sum over the first axis, neighbours first."""
    return ordered.added_in_tree(list(terms)) + np.float32(0)  # -0.0 + 0.0 is +0.0.


def wide(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Numbers whose sum depends on the order in which they are added."""
    return rng.standard_normal(shape) * np.exp2(rng.integers(-6, 6, shape))


def one_product_a_run(dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, a weight, and x @ weight with runs of 64 added in a tree; all other products are zero."""
    rng = np.random.default_rng(0)
    terms = wide(rng, ROWS, RUNS).astype(dtype)
    factors = np.exp2(rng.integers(-3, 3, (RUNS, COLUMNS))).astype(dtype)
    x, weight = np.zeros((ROWS, RUNS * 64), dtype), wide(rng, RUNS * 64, COLUMNS).astype(dtype)
    at = 64 * np.arange(RUNS) + rng.integers(0, 64, RUNS)
    x[:, at], weight[at] = terms, factors
    products = terms.T[:, :, None].astype(np.float32) * factors[:, None].astype(np.float32)
    return x, weight, numpy_tree(products)


def shapes() -> Iterator[tuple[int, int]]:
    """Numbers of rows and of columns."""
    yield from ((rows, columns) for rows in (1, 2, 3, 7, ROWS) for columns in (1, 16, 19, COLUMNS))


@every_dtype
def test_runs_of_a_matmul_are_added_in_a_tree_for_any_number_of_rows_and_columns(dtype):
    x, weight, expected = one_product_a_run(dtype)

    @jax.jit
    def found(x, weight):
        return [
            BACKEND.matmul(x[:m].astype(jnp.float32), weight[:, :n], ordered=True)
            for m, n in shapes()
        ]

    for (m, n), part in zip(shapes(), found(x, weight), strict=True):
        assert same_bits(part, expected[:m, :n]), (m, n)


@every_dtype
@pytest.mark.parametrize("behind", [0, 1, 64, 300])
def test_zeros_behind_the_terms_of_a_matmul_change_nothing(dtype, behind):
    x, weight, expected = one_product_a_run(dtype)
    more = np.pad(x, ((0, 0), (0, behind))), np.pad(weight, ((0, behind), (0, 0)))
    batch = (np.stack([part, part]) for part in more)
    for found in BACKEND.ordered_matmul(*map(jnp.asarray, batch), zeros_behind=True):
        assert same_bits(found, expected)


@every_dtype
def test_a_matmul_by_blocks_of_rows_has_the_same_bits(dtype, monkeypatch):
    x, weight, expected = one_product_a_run(dtype)
    monkeypatch.setattr(ordered, "_PARTIAL_BYTES", 5 * 4 * RUNS * COLUMNS)  # Five rows at a time.
    found = jax.make_jaxpr(ordered.matmul)(x, weight)
    assert f"[5,5,{x.shape[1]}]" in str(found)
    assert same_bits(ordered.matmul(jnp.asarray(x), jnp.asarray(weight)), expected)


@every_dtype
@pytest.mark.parametrize("length", [1, 37, 64, 67, 152, 896])
def test_an_ordered_matmul_is_as_near_as_its_longest_sum_allows(dtype, length):
    rng = np.random.default_rng(length)
    x, weight = wide(rng, 5, length).astype(dtype), wide(rng, length, 48).astype(dtype)
    found = np.asarray(BACKEND.matmul(jnp.asarray(x), jnp.asarray(weight), ordered=True))
    wide_x, wide_weight = x.astype(np.float64), weight.astype(np.float64)
    # An addition is off by 2^-24 at most: 64 in a sum, 4 up the tree.
    bound = 68 * 2.0**-24 * (np.abs(wide_x) @ np.abs(wide_weight))
    assert (np.abs(found - wide_x @ wide_weight) <= bound).all()


@every_dtype
def test_rows_are_summed_in_a_tree_whatever_the_number_of_rows_and_of_zeros_behind(dtype):
    x = wide(np.random.default_rng(1), 7, 149).astype(dtype)
    expected = numpy_tree(x.astype(np.float32).T)
    for rows in (1, 2, 7):
        for behind in (0, 1, 107):
            padded = jnp.pad(jnp.asarray(x[:rows]), ((0, 0), (0, behind)))
            found = jax.jit(lambda x: BACKEND.row_sums(x, zeros_behind=True))(padded)
            assert same_bits(found, expected[:rows])


@every_dtype
def test_no_sum_is_a_negative_zero(dtype):
    x, weight = -jnp.ones((2, 1), dtype), jnp.zeros((1, 4), dtype)
    assert not np.signbit(BACKEND.ordered_matmul(x, weight)).any()
    assert not np.signbit(BACKEND.row_sums(-jnp.zeros((2, 4), dtype))).any()


def test_zeros_have_a_derivative():
    # Where weights begin as zeros, so do sums; they have to be able to leave it.
    x, weight = np.ones((2, 3), np.float32), np.zeros((3, 2), np.float32)
    found = jax.grad(lambda weight: ordered.matmul(x, weight).sum())(weight)
    np.testing.assert_array_equal(found, np.full((3, 2), 2.0))
