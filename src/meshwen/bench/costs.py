# SPDX-License-Identifier: Apache-2.0
"""What a step has to read and to multiply, whatever the mesh: the least that any program needs.

Padding (but that of panels), copies of key/value heads and activations are not counted: they are
the program's own affair, and count as time lost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import jax.numpy as jnp

from meshwen.cache.kv_cache import cache_bytes_per_token
from meshwen.models.config import ModelConfig
from meshwen.parallel.plan import ParallelPlan
from meshwen.weights.declaration import EMBEDDING, LM_HEAD, Weight, declared_weights


@dataclass(frozen=True)
class Cost:
    """Of a step, on all devices together.

    Attributes:
        bytes: of weights and of the cache, to be read once.
        flops: of products; a multiplication and an addition are two.
    """

    bytes: int
    flops: int

    @property
    def intensity(self) -> float:
        """Operations for each byte read."""
        return self.flops / self.bytes

    def least_seconds(self, bandwidth: float, rate: float) -> float:
        """The time below which no program comes, by the roofline model (Williams et al., 2009).

        Args:
            bandwidth: bytes read a second, at most.
            rate: operations a second, at most.
        """
        return max(self.bytes / bandwidth, self.flops / rate)


def decode_cost(plan: ParallelPlan, dtype: jnp.dtype, batch: int, length: int) -> Cost:
    """One step of `batch` sequences that have `length` tokens each."""
    config = plan.config
    weights = _weights(plan)
    cache = length * cache_bytes_per_token(config, config.num_key_value_heads, dtype)
    embeddings = config.hidden_size
    attention = 2 * config.num_hidden_layers * _attention_products(config) * length
    return Cost(
        bytes=_bytes(weights, plan, dtype) + batch * (cache + embeddings * dtype.itemsize),
        flops=batch * (2 * _elements(weights, plan) + attention),
    )


def prefill_cost(plan: ParallelPlan, dtype: jnp.dtype, length: int) -> Cost:
    """One prompt of `length` tokens, and the logits of its last.

    Of the last layer, only keys and values of all tokens are needed.
    """
    config = plan.config
    *body, head = _weights(plan)
    products = length * _elements(body, plan) + _elements([head], plan)
    products -= (length - 1) * _elements(_of_last_token(body, config), plan)
    pairs = length * (length + 1) // 2
    embeddings = length * config.hidden_size * dtype.itemsize
    layers = config.num_hidden_layers
    attended = ((layers - 1) * pairs + length) * _attention_products(config)
    return Cost(
        bytes=_bytes([*body, head], plan, dtype) + embeddings,
        flops=2 * products + 2 * attended,
    )


def _attention_products(config: ModelConfig) -> int:
    """Multiplications of a query token with one key and one value, in a layer."""
    return 2 * config.num_attention_heads * config.head_dim


def _weights(plan: ParallelPlan) -> list[Weight]:
    """The weights that a token meets, the output head last."""
    config = plan.config
    tied = replace(EMBEDDING, transposed=True)
    body = [w for w in declared_weights(config) if w.name not in {EMBEDDING.name, LM_HEAD.name}]
    return [*body, tied if config.tie_word_embeddings else LM_HEAD]


def _of_last_token(weights: list[Weight], config: ModelConfig) -> list[Weight]:
    """Those that only a prompt's last token meets: the last layer's but for keys and values."""
    last = f"model.layers.{config.num_hidden_layers - 1}."
    for_all = ("input_layernorm", "k_proj", "v_proj")
    return [
        w
        for w in weights
        if w.name.startswith(last) and not any(part in w.name for part in for_all)
    ]


def _elements(weights: list[Weight], plan: ParallelPlan) -> int:
    return sum(prod(w.shape(plan)) for w in weights)


def _bytes(weights: list[Weight], plan: ParallelPlan, dtype: jnp.dtype) -> int:
    return sum(w.nbytes(w.shape(plan), plan, dtype) for w in weights)
