# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of tokens, and the likeliest tokens, from logits as the model gives them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float32, Int32

from meshwen.engine.split_vocabulary import likeliest, local_token_ids, without_padding
from meshwen.models.parallel_model import ParallelModel
from meshwen.ops.operations import Ops
from meshwen.ops.ordered import pad
from meshwen.weights.declaration import Params

_BLOCK = 64  # tokens of a prompt whose logits are in memory at once


class Logprobs(NamedTuple):
    """Of a token in each place, and of the likeliest tokens there.

    Attributes:
        chosen: of the token.
        top_ids: the likeliest tokens, likeliest first, equally likely ones by id; None where none
            were asked for.
        top: their log-probabilities.
    """

    chosen: Float32[Array, " B"]
    top_ids: Int32[Array, "B top"] | None = None
    top: Float32[Array, "B top"] | None = None


def token_logprobs(
    logits: Float32[Array, "B V"],
    ids: Int32[Array, " V"],
    tokens: Int32[Array, " B"],
    top: int,
    ops: Ops,
) -> Logprobs:
    """Log-probabilities of tokens, on every device, from this device's part of the logits.

    Args:
        logits: unmodified, but -inf in the padding of the vocabulary.
        ids: of this part.
        tokens: one a row.
        top: how many of the likeliest to give too, at most all.
        ops: the operations.
    """
    largest = ops.numerics.largest(logits.max(axis=1), ops.collectives)[:, None]
    shifted = logits - largest
    weights = ops.numerics.pointwise(jnp.exp, shifted)
    total = ops.numerics.vocabulary_sum(weights, ops.backend, ops.collectives)
    log_total = ops.numerics.pointwise(jnp.log, total)
    # One addend is not zero, so the sum is exact in any order.
    chosen = ops.numerics.select(
        jnp.where(ids == tokens[:, None], shifted, 0).sum(axis=1), ops.collectives
    )
    if not top:
        return Logprobs(chosen - log_total)
    values, top_ids = likeliest(logits, ids, top, ops)
    return Logprobs(chosen - log_total, top_ids, values - largest - log_total[:, None])


def prompt_logprobs_step(
    params: Params,
    hidden: Float32[Array, "N D"],
    targets: Int32[Array, " N"],
    *,
    top: int,
    model: ParallelModel,
) -> Logprobs:
    """Log-probabilities of the tokens that follow those of a prompt, under `shard_map`.

    A few tokens at a time: there may be no memory for the logits of all.

    Args:
        params: the weights.
        hidden: final hidden states; each row stands for itself.
        targets: the token that follows each.
        top: how many of the likeliest in its place to give too.
        model: the model.
    """
    ops, vocab_size = model.ops, model.config.vocab_size

    def of_block(block: tuple[Array, Array]) -> Logprobs:
        logits = model.logits(params, block[0])
        ids = local_token_ids(logits.shape[1], ops)
        logits = without_padding(logits, ids, vocab_size, ops)
        return token_logprobs(logits, ids, block[1], top, ops)

    count, size = len(targets), min(len(targets), _BLOCK)
    blocks = jax.tree.map(
        lambda x: pad(x, 0, -count % size).reshape(-1, size, *x.shape[1:]), (hidden, targets)
    )
    found: Logprobs = lax.map(of_block, blocks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)
