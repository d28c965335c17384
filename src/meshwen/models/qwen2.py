# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): config, weights, attention.

`meshwen.models.decoder` has what decoder-only models share, and the names of dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int32

from meshwen.cache.kv_cache import LayerCache
from meshwen.models import decoder
from meshwen.models.config import ModelConfig
from meshwen.models.decoder import Context, attend, queries_keys_values
from meshwen.models.decoder_weights import GATED_MLP, bias, decoder_weights, norm, projection
from meshwen.models.rope_frequencies import mean_rotation
from meshwen.ops.operations import Ops
from meshwen.ops.rotary import Rotary, rotate
from meshwen.weights.declaration import Params, Part, WeightDeclaration


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(ModelConfig):
    """Hyperparameters of one Qwen2 or Qwen2.5 model."""

    model_type: ClassVar[str] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"


CONFIG = Qwen2Config

_LAYER = (
    norm("input_layernorm", every_token=True),
    projection("self_attn.q_proj", "query", "embed", Part.QUERY_OUTPUT),
    bias("self_attn.q_proj", "query", Part.QUERY_OUTPUT),
    projection("self_attn.k_proj", "key_value", "embed", Part.KEY_VALUE),
    bias("self_attn.k_proj", "key_value", Part.KEY_VALUE),
    projection("self_attn.v_proj", "key_value", "embed", Part.KEY_VALUE),
    bias("self_attn.v_proj", "key_value", Part.KEY_VALUE),
    projection("self_attn.o_proj", "embed", "query", Part.QUERY_OUTPUT),
    norm("post_attention_layernorm"),
    *GATED_MLP,
)


def weights(config: Qwen2Config) -> tuple[WeightDeclaration, ...]:
    """Every weight, in the order of the forward pass."""
    return decoder_weights(config, _LAYER)


def attention(
    weights: Params,
    x: Float32[Array, "*tokens D"],
    context: Context,
    cache: LayerCache | None,
    last: Int32[Array, " B"] | None,
    config: Qwen2Config,
    ops: Ops,
) -> tuple[Float32[Array, "*asked D"], LayerCache | None]:
    """Self-attention; see `Attention`."""
    asked = context.selected(x, last)
    q, k, v = queries_keys_values(weights, x, asked, config.head_dim, ops)
    q, k = rotate(q, context.at(last).rotary, ops), rotate(k, context.rotary, ops)
    k = k - mean_key(weights["k_proj"]["bias"].array, config, ops)
    y, cache = attend(q, k, v, context, cache, ops, weights["k_proj"]["weight"].dtype, last)
    return ops.row(y, weights["o_proj"]), cache


def mean_key(bias: Float[Array, " heads"], config: Qwen2Config, ops: Ops) -> Float32[Array, "K H"]:
    """What the bias of K*H numbers adds to all keys alike: the mean over positions of it, rotated.

    Softmax does not see a vector that is subtracted from all keys: it moves all scores of a query
    by one number. Qwen2.5's key biases are so large (a norm of 278 in the 0.5B), in the slowest
    rotary pairs, that rounding keys with them to bfloat16 would move scores by whole units.
    """
    heads = bias.astype(jnp.float32).reshape(-1, config.head_dim)
    cos, sin = (jnp.asarray(part)[None] for part in mean_rotation(config))
    return rotate(heads, Rotary(cos, sin), ops)


hidden_states = partial(decoder.hidden_states, attention=attention)
logits = decoder.logits
