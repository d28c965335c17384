# SPDX-License-Identifier: Apache-2.0
"""What a step has to read and to multiply, whatever the mesh: the least that any program needs.

Padding (but that of panels), copies of key/value heads and activations are not counted: they are
the program's own affair, and count as time lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from meshwen.models.config import ModelConfig
from meshwen.models.parallel_model import ParallelModel
from meshwen.weights.declaration import Part
from meshwen.weights.layout import WeightLayout


@dataclass(frozen=True)
class Cost:
    """Of a step, on all devices together.

    Attributes:
        bytes: of weights and of the cache, to be read once.
        flops: of matmuls; a multiplication and an addition are two.
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


def decode_cost(model: ParallelModel, batch: int, length: int) -> Cost:
    """One step of `batch` sequences that have `length` tokens each."""
    config = model.config
    weights = _matmuls(model)
    cache = length * model.cache_bytes_per_token(config.num_key_value_heads)
    embeddings = config.hidden_size * model.dtype.itemsize
    attention = 2 * config.num_hidden_layers * _attention_terms(config) * length
    return Cost(
        bytes=_bytes(weights, model) + batch * (cache + embeddings),
        flops=batch * (2 * _elements(weights) + attention),
    )


def prefill_cost(model: ParallelModel, length: int) -> Cost:
    """One prompt of `length` tokens, and the logits of its last.

    Of the last layer, only keys and values of all tokens are needed.
    """
    config = model.config
    *body, head = _matmuls(model)
    terms = length * _elements(body) + _elements([head])
    terms -= (length - 1) * _elements(_of_last_token(body, config))
    pairs = length * (length + 1) // 2
    embeddings = length * config.hidden_size * model.dtype.itemsize
    layers = config.num_hidden_layers
    attended = ((layers - 1) * pairs + length) * _attention_terms(config)
    return Cost(
        bytes=_bytes([*body, head], model) + embeddings,
        flops=2 * (terms + attended),
    )


def _attention_terms(config: ModelConfig) -> int:
    """Multiplications of a query token with one key and one value, in a layer."""
    return 2 * config.num_attention_heads * config.head_dim


def _matmuls(model: ParallelModel) -> list[WeightLayout]:
    """The weights that a token meets, the output head last."""
    weights = model.weights
    table = next(weight for weight in weights.declared if weight.declaration.part is Part.EMBEDDING)
    body = [w for w in weights.declared if w.declaration.part not in (Part.EMBEDDING, Part.HEAD)]
    heads = [weight for weight in weights.declared if weight.declaration.part is Part.HEAD]
    return [*body, *(heads or [weights.as_head(table.declaration)])]


def _of_last_token(weights: list[WeightLayout], config: ModelConfig) -> list[WeightLayout]:
    """Those that only a prompt's last token meets: the last layer's but for keys and values."""
    last = config.num_hidden_layers - 1
    return [w for w in weights if w.declaration.layer == last and not w.declaration.every_token]


def _elements(weights: list[WeightLayout]) -> int:
    return sum(prod(weight.declaration.shape(weight.plan.sizes)) for weight in weights)


def _bytes(weights: list[WeightLayout], model: ParallelModel) -> int:
    return sum(weight.model_bytes(model.dtype) for weight in weights)
