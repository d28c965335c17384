# SPDX-License-Identifier: Apache-2.0
"""Sampling: how a token is drawn from split logits.

The vocabulary is split over the devices, and full logits are never gathered: each device offers its
best candidates, and the few that are left decide. Noise is a function of the request's seed, the
position and the token's id alone, so a seeded request draws the same tokens on every mesh, in every
batch and by every method, as long as the logits are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float32, Int32, UInt32

from meshwen.engine.logprobs import token_logprobs
from meshwen.engine.penalties import Penalized, penalize
from meshwen.engine.sampling_params import MOST_TOP_LOGPROBS, SamplingParams
from meshwen.engine.split_vocabulary import likeliest, local_token_ids, without_padding
from meshwen.ops.operations import Ops
from meshwen.ops.ordered import long_tree_sum
from meshwen.runtime.jax_settings import own_settings

NO_TOKEN = -1  # Drawn where logits are not finite, or no token may come.

_CANDIDATES = tuple(2 * 4**n for n in range(1, 16))  # 8, 32, 128, ...: few are compiled.
_TOP_LOGPROBS = (0, 5, MOST_TOP_LOGPROBS)
# Factors of logits: within these, none below 2**63 overflows, and the noise decides between equal
# ones alone.
_LEAST_FACTOR, _MOST_FACTOR = 2.0**-64, 2.0**64


@dataclass(frozen=True)
class SamplingMethod:
    """What a batch of requests needs compiled.

    Attributes:
        candidates: 1 for greedy, 0 to draw from the whole vocabulary by noise alone, else how many
            of the likeliest tokens the filters can keep.
        penalize: some request has a penalty on tokens of its answer.
        logprobs: some request wants log-probabilities.
        top_logprobs: how many of the likeliest tokens some request wants at most, or more.
    """

    candidates: int
    penalize: bool
    logprobs: bool
    top_logprobs: int = 0

    @classmethod
    def of(cls, batch: Sequence[SamplingParams], vocab_size: int) -> SamplingMethod:
        """The method that serves all requests of a batch."""
        needs = {_candidates(params, vocab_size) for params in batch}
        candidates = needs.pop() if len(needs) == 1 else max(n or vocab_size for n in needs)
        if 1 < candidates < vocab_size:
            candidates = next(size for size in _CANDIDATES if size >= candidates)
            candidates = min(candidates, vocab_size)
        return cls(
            candidates,
            any(params.repetition_penalty != 1 or params.counted for params in batch),
            any(params.logprobs for params in batch),
            top_bucket(max(p.top_logprobs * p.logprobs for p in batch), vocab_size),
        )


def top_bucket(count: int, vocab_size: int) -> int:
    """How many likeliest tokens a program gives where so many are wanted: few are compiled."""
    return min(next(size for size in _TOP_LOGPROBS if size >= count), vocab_size)


def _candidates(params: SamplingParams, vocab_size: int) -> int:
    if params.temperature == 0:
        return 1
    if params.top_k:
        return min(params.top_k, vocab_size)
    return vocab_size if params.top_p < 1 or params.min_p > 0 else 0


class SamplerRows(NamedTuple):
    """The requests' parameters, a row each: [B], or [B, V padded] where there is a default.

    Where a step samples after draft tokens too, `forbidden` has a row for each sample.
    """

    temperature: Array
    top_p: Array
    top_k: Array
    min_p: Array
    repetition_penalty: Array
    encoder_repetition_penalty: Array  # Its inverse, as it is applied to large logits.
    presence_penalty: Array
    frequency_penalty: Array
    seed: Array
    bias: ArrayLike | None = None  # float32, added to logits.
    forbidden: ArrayLike | None = None  # bool: tokens that may not come next.
    prompt: ArrayLike | None = None  # bool: its tokens, where one has a penalty of its own.

    @classmethod
    @own_settings()
    def of(cls, batch: Sequence[SamplingParams]) -> SamplerRows:
        """The rows of a batch, without what is [B, V]."""

        def column(values: Iterable[float], dtype: Any = jnp.float32) -> Array:
            return jnp.array(list(values), dtype)

        return cls(
            column(p.temperature and _factor(p.temperature) for p in batch),
            column(p.top_p for p in batch),
            column((p.top_k for p in batch), jnp.int32),
            column(p.min_p for p in batch),
            column(_factor(p.repetition_penalty) for p in batch),
            column(1 / _factor(p.encoder_repetition_penalty) for p in batch),
            column(p.presence_penalty for p in batch),
            column(p.frequency_penalty for p in batch),
            column((p.seed for p in batch), jnp.uint32),
        )

    @classmethod
    def filled(cls, row: Any, table: Any) -> SamplerRows:
        """With one value for all that is [B], and one for all that is [B, V padded]."""
        return cls._make(table if name in cls._field_defaults else row for name in cls._fields)


def _factor(number: float) -> float:
    return min(max(number, _LEAST_FACTOR), _MOST_FACTOR)


class Sampled(NamedTuple):
    """One token a sequence, and where they are wanted log-probabilities: see `Logprobs`."""

    tokens: Int32[Array, " B"]
    logprobs: Float32[Array, " B"] | None
    top_ids: Int32[Array, "B top"] | None = None
    top_logprobs: Float32[Array, "B top"] | None = None


def sample(
    logits: Float32[Array, "B V"],
    rows: SamplerRows,
    positions: Int32[Array, " B"],
    penalized: Penalized | None,
    vocab_size: int,
    method: SamplingMethod,
    ops: Ops,
) -> Sampled:
    """Draws each sequence's next token; runs on every device under `shard_map`.

    `NO_TOKEN` where a logit is not finite, or none is left that may come.

    Args:
        logits: this device's part of the (padded) vocabulary.
        rows: the requests' parameters; of the vocabulary, this device's part.
        positions: the position that the token will have.
        penalized: tokens that penalties apply to, this device's part; or None.
        vocab_size: of the whole vocabulary, before padding.
        method: what the batch needs.
        ops: the operations.
    """
    ids = local_token_ids(logits.shape[1], ops)
    finite = jnp.isfinite(logits) | (ids >= vocab_size)
    raw = logits = without_padding(logits, ids, vocab_size, ops)
    if rows.bias is not None:
        logits = logits + rows.bias
    if rows.prompt is not None:
        inverse = rows.encoder_repetition_penalty[:, None]
        kept = jnp.where(logits < 0, logits * inverse, logits / inverse)
        logits = jnp.where(rows.prompt, kept, logits)
    if method.penalize and penalized is not None:
        logits = penalize(
            logits,
            penalized,
            rows.repetition_penalty,
            rows.presence_penalty,
            rows.frequency_penalty,
            ops,
        )
    if rows.forbidden is not None:
        logits = jnp.where(rows.forbidden, -jnp.inf, logits)
    # What is not finite becomes the largest, so that whoever looks for that finds it. (The largest
    # of NaN and a number is now one, now the other.)
    logits = jnp.where(finite, logits, jnp.inf)
    if method.candidates:
        values, choices = likeliest(logits, ids, method.candidates, ops)
        tokens = choices[:, 0]
        if method.candidates > 1:
            values, tokens = _draw(values, choices, rows, positions, ops)
    else:
        (scaled,) = ops.numerics.rounded((logits / rows.temperature[:, None],))
        scores = _scores(scaled, _noise(rows.seed, positions, ids[None], ops))
        values, choices = likeliest(scores, ids, 1, ops)
        tokens = choices[:, 0]
    tokens = jnp.where(jnp.isfinite(values[:, 0]), tokens, NO_TOKEN)
    if not method.logprobs:
        return Sampled(tokens, None)
    return Sampled(tokens, *token_logprobs(raw, ids, tokens, method.top_logprobs, ops))


def _draw(
    values: Float32[Array, "B few"],
    choices: Int32[Array, "B few"],
    rows: SamplerRows,
    positions: Int32[Array, " B"],
    ops: Ops,
) -> tuple[Float32[Array, "B few"], Int32[Array, " B"]]:
    """Draws from candidates sorted by logit; filters as transformers orders them.

    Returns:
        The logits divided by the temperature, and the tokens.
    """
    greedy = rows.temperature == 0
    temperature = jnp.where(greedy, 1, rows.temperature)[:, None]
    rank = jnp.arange(values.shape[1])
    top_k = jnp.where(rows.top_k == 0, values.shape[1], rows.top_k)[:, None]
    (scaled,) = ops.numerics.rounded((values / temperature,))
    scaled = jnp.where(rank < top_k, scaled, -jnp.inf)
    # Sums whose order depends neither on the number of rows nor on that of the candidates: what a
    # request draws is its own affair.
    weights = ops.numerics.pointwise(jnp.exp, scaled - scaled[:, :1])
    total = long_tree_sum(weights)
    probabilities = weights / total
    before = (lax.associative_scan(jnp.add, weights, axis=1) - weights) / total
    top_p = rows.top_p[:, None]
    keep = (before < top_p) | (rank == 0) | (top_p >= 1)
    kept = jnp.where(keep, probabilities, 0)
    keep &= kept >= rows.min_p[:, None] * kept[:, :1]
    scores = _scores(scaled, _noise(rows.seed, positions, choices, ops))
    scores = jnp.where(keep, scores, -jnp.inf)
    # Of equal scores the lowest id, as without filters: what else is in the batch decides whether
    # there are any.
    best = scores == scores.max(axis=1, keepdims=True)
    drawn = jnp.where(best, choices, jnp.iinfo(jnp.int32).max).min(axis=1)
    return scaled, jnp.where(greedy | ~best.any(axis=1), choices[:, 0], drawn)


def _scores(scaled: Float32[Array, "B N"], noise: Float32[Array, "B N"]) -> Float32[Array, "B N"]:
    """Logits with noise; what is not finite keeps its place, whatever the noise."""
    lowest = jnp.finfo(scaled.dtype).min
    return jnp.where(jnp.isfinite(scaled), jnp.maximum(scaled + noise, lowest), scaled)


def _noise(
    seed: UInt32[Array, " B"], positions: Int32[Array, " B"], ids: Int32[Array, "_ N"], ops: Ops
) -> Float32[Array, "B N"]:
    """Gumbel noise, whose argmax with logits draws from their softmax."""

    def row(seed: Array, position: Array, ids: Array) -> Array:
        # Not `jax.random.key`, which adds a number of the caller's settings to the seed.
        words = jnp.stack([jnp.zeros_like(seed), seed])
        key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), position)
        bits = jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(key, i))[0])(ids)
        # Small numbers, which make large noise, are the finest; none is 0, whose noise is infinite.
        return (bits.astype(jnp.float32) + 0.5) * 2.0**-32

    ids = jnp.broadcast_to(ids, (seed.shape[0], ids.shape[1]))
    uniform = jax.vmap(row)(seed, positions, ids)
    return ops.numerics.pointwise(gumbel, uniform)


def gumbel(uniform: Array) -> Array:
    """-log(-log(1 - uniform)), elementwise, of float32 numbers above 0 and up to 1.

    log(1 - u) is Kahan's: log of the rounded difference, corrected for what rounding lost of u.
    XLA's log1p has other bits on ARM than on x86; the functions here have the same.
    """
    rest = 1 - uniform
    kept = 1 - rest  # of u, exactly
    small = kept == 0
    exponential = -jnp.log(rest) * (uniform / jnp.where(small, 1, kept))
    return -jnp.log(jnp.where(small, uniform, exponential))
