# SPDX-License-Identifier: Apache-2.0
"""What each device computes in a program, over plain weights and caches.

B sequences, T tokens of each, S positions of the cache, V vocabulary of this device.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32, Int, Int32, Num

from meshwen.engine import steps
from meshwen.handoff.plain import Plain, plain_cache, typed_cache, typed_params
from meshwen.handoff.portable import portable_ops
from meshwen.models.parallel_model import ParallelModel
from meshwen.ops.attention import RowTokens
from meshwen.ops.operations import Ops
from meshwen.weights.declaration import Params


@dataclass(frozen=True)
class Steps:
    """The programs of a model.

    Attributes:
        model: without kernels.
        tokens: whether prefill and decode give the likeliest token, int32 [B], in the place of
            logits, float32 [B, V].
    """

    model: ParallelModel
    tokens: bool = False

    def output(self, params: Params, x: Float32[Array, "B D"], ops: Ops) -> Num[Array, "B ..."]:
        """What follows final hidden states."""
        logits = self.model.architecture.logits(params, x, ops)
        return greedy(logits, self.model.config.vocab_size, ops) if self.tokens else logits


@dataclass(frozen=True)
class NativeSteps(Steps):
    """What is the engine's but for its sampler and its cache, which is rows here."""

    def logits(self, params: Plain, input_ids: Int[Array, "B T"]) -> Float32[Array, "B T V"]:
        """Logits of whole sequences."""
        weights = typed_params(params, self.model.weights)
        return steps.logits_step(weights, input_ids.astype(jnp.int32), model=self.model)

    def prefill(
        self,
        params: Plain,
        cache: Plain,
        input_ids: Int[Array, "B T"],
        lengths: Int[Array, " B"],
    ) -> tuple[Array, Plain]:
        """What follows prompts of some lengths, and the cache with them from position 0 on."""
        weights, ids = typed_params(params, self.model.weights), input_ids.astype(jnp.int32)
        tokens, last = _from_the_first(ids), lengths.astype(jnp.int32) - 1
        x, written = self.model.hidden_states(weights, ids, tokens, typed_cache(cache), last=last)
        return self.output(weights, _only(x), self.model.ops), plain_cache(written)

    def decode(
        self,
        params: Plain,
        cache: Plain,
        input_ids: Int[Array, "B 1"],
        positions: Int[Array, " B"],
    ) -> tuple[Array, Plain]:
        """What follows each sequence's token at its position, and the cache with these tokens."""
        weights, ids = typed_params(params, self.model.weights), input_ids.astype(jnp.int32)
        held = typed_cache(cache)
        length = held[0].length(self.model.backend.cache_layout)
        tokens = RowTokens(positions.astype(jnp.int32), 1, length)
        x, written = self.model.hidden_states(weights, ids, tokens, held)
        return self.output(weights, _only(x), self.model.ops), plain_cache(written)


@dataclass(frozen=True)
class PortableSteps(Steps):
    """The same in few operations: see `meshwen.handoff.portable`.

    Attributes:
        composites: whether norms and attention are composites.
    """

    composites: bool = False

    def logits(
        self, params: Plain, device: Int32[Array, " 1"], input_ids: Int[Array, "B T"]
    ) -> Float32[Array, "B T V"]:
        """Logits of whole sequences."""
        ops = portable_ops(self.model.ops, device, composites=self.composites)
        weights, ids = typed_params(params, self.model.weights), input_ids.astype(jnp.int32)
        x, _ = self.model.hidden_states(weights, ids, _from_the_first(ids), None, ops=ops)
        return self.model.architecture.logits(weights, x, ops)

    def prefill(
        self,
        params: Plain,
        device: Int32[Array, " 1"],
        cache: Plain,
        input_ids: Int[Array, "B T"],
        positions: Int[Array, " T"],
        last: Int[Array, " 1"],
    ) -> tuple[Array, Plain]:
        """What follows the token at the index `last` of each sequence, and the cache with all.

        The positions are 0, 1, ..., T - 1.
        """
        return self._step(params, device, cache, input_ids, positions, input_ids.shape[1], last)

    def decode(
        self,
        params: Plain,
        device: Int32[Array, " 1"],
        cache: Plain,
        input_ids: Int[Array, "B 1"],
        position: Int[Array, " 1"],
    ) -> tuple[Array, Plain]:
        """What follows each sequence's token at the position of all, and the cache with these."""
        return self._step(params, device, cache, input_ids, position, cache[0]["keys"].shape[2])

    def _step(
        self,
        params: Plain,
        device: Array,
        cache: Plain,
        input_ids: Array,
        positions: Array,
        length: int,
        last: Array | None = None,
    ) -> tuple[Array, Plain]:
        positions = positions.astype(jnp.int32)
        ops = portable_ops(self.model.ops, device, positions, composites=self.composites)
        weights, ids = typed_params(params, self.model.weights), input_ids.astype(jnp.int32)
        start = jnp.broadcast_to(positions[:1], ids.shape[:1])
        tokens = RowTokens(start, ids.shape[1], length)
        x, written = self.model.hidden_states(weights, ids, tokens, typed_cache(cache), ops=ops)
        if last is not None:
            x = jnp.take(x, last.astype(jnp.int32), axis=1)
        return self.output(weights, _only(x), ops), plain_cache(written)


def _from_the_first(ids: Int32[Array, "B T"]) -> RowTokens:
    """Whole sequences, to which all there is to attend to are they themselves."""
    return RowTokens(jnp.zeros(len(ids), jnp.int32), ids.shape[1], ids.shape[1])


def greedy(logits: Float32[Array, "B V"], vocab_size: int, ops: Ops) -> Int32[Array, " B"]:
    """The likeliest token of each sequence, of equals the first; on every device.

    No token of the vocabulary where a logit is NaN.
    """
    count = logits.shape[1]
    ids = ops.collectives.index() * count + jnp.arange(count, dtype=jnp.int32)
    logits = jnp.where(ids < vocab_size, logits, jnp.float32(-jnp.inf))
    largest = ops.collectives.all_reduce_max(logits.max(axis=1))
    first = jnp.where(logits == largest[:, None], ids, jnp.iinfo(jnp.int32).max).min(axis=1)
    return -ops.collectives.all_reduce_max(-first)


def _only(x: Float32[Array, "B 1 D"]) -> Float32[Array, "B D"]:
    """Hidden states of the one token of each sequence."""
    return x.reshape(x.shape[0], x.shape[2])
