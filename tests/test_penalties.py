# SPDX-License-Identifier: Apache-2.0
"""Penalties by the float32 arithmetic of their definitions, and the tokens that they count."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from meshwen.engine.penalties import Penalized, mark_penalized, penalize
from meshwen.ops.cpu.xla import XlaOnCpu
from meshwen.ops.numerics.exact import Exact
from meshwen.ops.operations import Ops
from meshwen.parallel.collectives import Collectives
from meshwen.parallel.mesh import make_mesh, model_axes

pytestmark = pytest.mark.usefixtures("optimised")
ROWS, VOCAB = 3, 1000


def tables():
    """Logits, tokens seen, counts, and the penalties of each row."""
    rng = np.random.default_rng(0)
    logits = (4 * rng.standard_normal((ROWS, VOCAB))).astype(np.float32)
    counts = rng.poisson(2, (ROWS, VOCAB)).astype(np.int32)
    seen = (counts > 0) | (rng.random((ROWS, VOCAB)) < 0.2)
    penalties = rng.uniform(0.3, 1.7, (3, ROWS)).astype(np.float32)
    return logits, seen, counts, penalties


@pytest.mark.parametrize("width", [VOCAB, 333, 7])
def test_exact_penalties_by_counts_round_each_operation_once(width):
    logits, seen, counts, penalties = (table[..., :width] for table in tables())
    backend = XlaOnCpu()
    ops = Ops(numerics=Exact(), backend=backend)

    @partial(jax.jit, compiler_options=backend.compiler_options(ordered=True))
    def penalized(by):
        return penalize(jnp.asarray(logits), by, *map(jnp.asarray, penalties), ops)

    _, presence, frequency = penalties[..., None]
    for before in (None, seen):
        expected = np.asarray(penalized(Penalized(before)))
        expected = expected - frequency * counts.astype(np.float32)
        expected -= np.where(counts > 0, presence, np.float32(0))
        assert expected.dtype == np.float32
        np.testing.assert_array_equal(penalized(Penalized(before, counts)), expected)


def test_a_row_without_penalties_keeps_its_logits():
    logits, seen, counts, _ = tables()
    ops, none = Ops(), jnp.zeros(ROWS)
    for penalized in (Penalized(), Penalized(seen), Penalized(seen, counts)):
        found = penalize(jnp.asarray(logits), penalized, none + 1, none, none, ops)
        np.testing.assert_array_equal(found, logits)


@pytest.mark.parametrize("mesh", ["1", "2x4"])
def test_a_new_token_is_marked_and_counted(mesh):
    devices = make_mesh(mesh)
    axes, size = model_axes(devices), 7 * devices.size
    split = PartitionSpec(None, axes)
    mark = jax.shard_map(
        lambda before, tokens: mark_penalized(before, tokens, Ops(Collectives(axes))),
        mesh=devices,
        in_specs=(split, PartitionSpec()),
        out_specs=split,
    )
    rng = np.random.default_rng(0)
    seen, counts = rng.random((size, size)) < 0.2, rng.poisson(1, (size, size)).astype(np.int32)
    tokens = np.arange(size)
    tokens[3] = -1  # No token.
    new = np.eye(size, dtype=bool)
    new[3] = False
    found = jax.jit(mark)(Penalized(seen, counts), tokens)
    np.testing.assert_array_equal(found.tokens, seen | new)
    np.testing.assert_array_equal(found.counts, counts + new)
    assert found.counts.dtype == np.int32
    assert jax.jit(mark)(Penalized(None, counts), tokens).tokens is None
    assert jax.jit(mark)(Penalized(seen, None), tokens).counts is None
