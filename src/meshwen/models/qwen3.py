# SPDX-License-Identifier: Apache-2.0
"""Qwen3, dense (arXiv 2505.09388): config, weights, attention.

Other than Qwen2 it has no biases, and norms queries and keys, each head by itself, before they are
rotated. `meshwen.models.decoder` has what decoder-only models share, and the names of dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from jax import Array
from jaxtyping import Float32, Int32

from meshwen.cache.kv_cache import LayerCache
from meshwen.errors import MeshwenError
from meshwen.models import decoder
from meshwen.models.config import ModelConfig
from meshwen.models.decoder import Context, attend, queries_keys_values
from meshwen.models.decoder_weights import GATED_MLP, decoder_weights, norm, projection
from meshwen.ops.operations import Ops
from meshwen.ops.rotary import rotate
from meshwen.weights.declaration import Params, Part, WeightDeclaration


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(ModelConfig):
    """Hyperparameters of one dense Qwen3 model; ``head_dim`` is its own number."""

    model_type: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3ForCausalLM"

    @classmethod
    def check_file(cls, data: Mapping[str, Any]) -> None:
        """Refuse a config.json without ``head_dim``, or with biases."""
        if data.get("head_dim") is None:
            raise MeshwenError("head_dim is missing")
        if data.get("attention_bias"):
            raise MeshwenError("attention_bias true is not supported")


CONFIG = Qwen3Config

_LAYER = (
    norm("input_layernorm", every_token=True),
    projection("self_attn.q_proj", "query", "embed", Part.QUERY_OUTPUT),
    norm("self_attn.q_norm", "head_dim"),
    projection("self_attn.k_proj", "key_value", "embed", Part.KEY_VALUE),
    norm("self_attn.k_norm", "head_dim", every_token=True),
    projection("self_attn.v_proj", "key_value", "embed", Part.KEY_VALUE),
    projection("self_attn.o_proj", "embed", "query", Part.QUERY_OUTPUT),
    norm("post_attention_layernorm"),
    *GATED_MLP,
)


def weights(config: Qwen3Config) -> tuple[WeightDeclaration, ...]:
    """Every weight, in the order of the forward pass."""
    return decoder_weights(config, _LAYER)


def attention(
    weights: Params,
    x: Float32[Array, "*tokens D"],
    context: Context,
    cache: LayerCache | None,
    last: Int32[Array, " B"] | None,
    config: Qwen3Config,
    ops: Ops,
) -> tuple[Float32[Array, "*asked D"], LayerCache | None]:
    """Self-attention; see `Attention`."""
    asked = context.selected(x, last)
    q, k, v = queries_keys_values(weights, x, asked, config.head_dim, ops)
    q = ops.rms_norm(q, weights["q_norm"], config.rms_norm_eps)
    k = ops.rms_norm(k, weights["k_norm"], config.rms_norm_eps)
    q, k = rotate(q, context.at(last).rotary, ops), rotate(k, context.rotary, ops)
    y, cache = attend(q, k, v, context, cache, ops, weights["k_proj"]["weight"].dtype, last)
    return ops.row(y, weights["o_proj"]), cache


hidden_states = partial(decoder.hidden_states, attention=attention)
logits = decoder.logits
