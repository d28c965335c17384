# SPDX-License-Identifier: Apache-2.0
"""Attention by the paged kernel, of sequences that each have all their positions in one block."""

import jax.numpy as jnp
from jax import Array

from meshwen.ops.cpu import kernels


def attention(q, keys, values, rows, starts, window, alone=False) -> Array:
    """softmax(q keys) values, of tokens that follow one another.

    Args:
        q: [B, N, T, H], scaled; token t of sequence b is at position starts[b] + t.
        keys, values: [C, K, H, S] and [C, K, S, H]: a row holds a sequence.
        rows: int32 [B], of the sequences.
        starts: int32 [B].
        window: how many positions a token sees at most.
        alone: see `kernels.matmul`.

    Returns:
        [B, N, T, H].
    """
    (B, N, T, H), S = q.shape, keys.shape[3]
    keys, values = _padded(keys, -H % 32, -S % 32), _padded(values, -S % 32, -H % 32)
    where = jnp.arange(B + 1) * T, jnp.asarray(starts) + T, jnp.asarray(rows)[:, None]
    tokens = jnp.asarray(q).swapaxes(1, 2).reshape(B * T, N, H)
    y = kernels.paged_attention(tokens, keys, values, *where, window, alone)
    return y.reshape(B, T, N, H).swapaxes(1, 2)


def _padded(x, *missing: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), *((0, count) for count in missing)))
