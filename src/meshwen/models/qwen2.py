# SPDX-License-Identifier: Apache-2.0
"""Qwen2's forward pass: embed, decoder layers, norm, logits (arXiv 2407.10671, 2412.15115).

Written for one device. On a mesh each device runs it under `shard_map` with its own part of the
weights, heads and cache; devices meet in the contractions of `TensorParallel` and nowhere else.

Dimensions: B batch, T query tokens, S key positions, D hidden size, F intermediate size,
K key/value heads of this device, G query-head slots for each, H head_dim, V vocabulary.

The residual stream, norms, rotations, attention scores and softmax are float32; products with
weights take their inputs in the weights' dtype and accumulate in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from meshwen.cache.kv_cache import AnyCache, LayerCache, SequenceCache
from meshwen.models.config import ModelConfig
from meshwen.ops.contractions import TensorParallel
from meshwen.ops.rotary import inverse_frequencies

Params = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(ModelConfig):
    """Hyperparameters of one Qwen2 or Qwen2.5 model."""

    model_type: ClassVar[str] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"


CONFIG = Qwen2Config


class Seen(NamedTuple):
    """Which keys the queries see: each the last `window` ones up to its own."""

    start: Array  # int32 [B], the position of the first query's key
    window: Array  # int32 []
    bias: Array  # float32 [B, T, S], the same to be added to scores: 0, or the lowest number


def hidden_states(
    params: Params,
    token_ids: Array,
    start: Array,
    cache: tuple[AnyCache, ...] | None,
    slots: int,
    config: ModelConfig,
    tp: TensorParallel,
    wanted: Array | None = None,
) -> tuple[Array, tuple[AnyCache, ...]]:
    """The final hidden states, normalised.

    Args:
        params: this device's weights, as declared in `meshwen.weights.declaration`.
        token_ids: int32 [B, T], tokens that follow one another. Padding stands behind them, where
            none of them sees it.
        start: int32 [B], the positions of the first ones.
        cache: keys and values of earlier tokens. The tokens' own are written at the slots from
            `start` on. None: there are none, and `start` is 0.
        slots: S, the keys from position 0 on that tokens may see: of the cache, or all T.
        config: the model's hyperparameters.
        tp: the contractions.
        wanted: int32 [B], the one token of each row, 0 for the first, whose state is asked for: of
            the others the last layer computes keys and values alone. None: all are.

    Returns:
        float32 [B, T, D], or [B, 1, D] where one is wanted, and the updated cache; () without one.
    """
    model = params["model"]
    positions = start[:, None] + jnp.arange(token_ids.shape[1])
    rotary = rotary_tables(config, positions, tp)
    seen = {kind: _seen(positions, slots, config, kind) for kind in set(config.layer_types)}
    # Layers of one kind share a trace: 24 of them then lower in the time of one.
    layer = jax.jit(partial(decoder_layer, config=config, tp=tp))
    x = tp.embed(token_ids, model["embed_tokens"]["weight"])
    new_cache = []
    for i, weights in enumerate(model["layers"]):
        layer_cache = None if cache is None else cache[i]
        asked = wanted if i == config.num_hidden_layers - 1 else None
        x, layer_cache = layer(weights, x, rotary, seen[config.layer_types[i]], layer_cache, asked)
        if layer_cache is not None:
            new_cache.append(layer_cache)
    x = rms_norm(x, model["norm"]["weight"], config.rms_norm_eps, tp)
    return x, tuple(new_cache)


def logits(params: Params, x: Array, tp: TensorParallel) -> Array:
    """This device's part of the vocabulary's logits: float32 [..., D] -> float32 [..., V/n].

    Positions of the vocabulary that are padding get the logit 0, as their weights are zero.
    """
    if "lm_head" in params:
        return tp.column(x, params["lm_head"]["weight"])
    return tp.tied_logits(x, params["model"]["embed_tokens"]["weight"])


def decoder_layer(
    weights: Params,
    x: Array,
    rotary: tuple[Array, Array],
    seen: Seen,
    cache: AnyCache | None,
    wanted: Array | None,
    *,
    config: ModelConfig,
    tp: TensorParallel,
) -> tuple[Array, AnyCache | None]:
    """One pre-norm layer: [B, T, D] -> [B, T, D], or of the wanted tokens [B, 1, D]."""
    h = rms_norm(x, weights["input_layernorm"]["weight"], config.rms_norm_eps, tp)
    h, cache = attention(weights["self_attn"], h, rotary, seen, cache, wanted, config.head_dim, tp)
    x = _at(x, wanted, axis=1) + h
    h = rms_norm(x, weights["post_attention_layernorm"]["weight"], config.rms_norm_eps, tp)
    return x + mlp(weights["mlp"], h, tp), cache


def attention(
    weights: Params,
    x: Array,
    rotary: tuple[Array, Array],
    seen: Seen,
    cache: AnyCache | None,
    wanted: Array | None,
    head_dim: int,
    tp: TensorParallel,
) -> tuple[Array, AnyCache | None]:
    """Grouped-query attention (arXiv 2305.13245), this device's heads: [B, T, D] -> [B, T, D].

    Of the wanted tokens, where some are: -> [B, 1, D].
    """
    q, k, v = (
        _split_heads(tp.column(x, weights[name]["weight"], weights[name]["bias"]), head_dim)
        for name, x in (("q_proj", _at(x, wanted, axis=1)), ("k_proj", x), ("v_proj", x))
    )  # [B, K*G, T, H], [B, K, T, H], [B, K, T, H]
    k = rotate(k, rotary, tp)
    q = rotate(q, (_at(rotary[0], wanted, axis=2), _at(rotary[1], wanted, axis=2)), tp)
    k, v = k.swapaxes(2, 3), v.astype(weights["v_proj"]["weight"].dtype)  # k [B, K, H, T]
    q = q * head_dim**-0.5
    cache = None if cache is None else cache.written(k, v, seen.start)
    if wanted is not None:
        seen = Seen(seen.start + wanted, seen.window, _at(seen.bias, wanted, axis=1))
    slots = seen.bias.shape[-1]
    own = LayerCache(k, v)  # All that there is where nothing came before.
    held: LayerCache | SequenceCache = own if cache is None or slots == k.shape[3] else cache
    if tp.kernels:
        y = tp.attention(q, *held.located(), seen.start, seen.window)
    else:
        y = softmax_attention(q, *held.read(slots), seen.bias, tp)
    return tp.row(_merge_heads(y), weights["o_proj"]["weight"]), cache


def softmax_attention(q: Array, k: Array, v: Array, bias: Array, tp: TensorParallel) -> Array:
    """softmax(q k^T + bias) v, each key/value head serving its G consecutive query heads.

    Args:
        q: float32 [B, K*G, T, H], divided by sqrt(H).
        k: float32 [B, K, H, S].
        v: [B, K, S, H].
        bias: float32 [B, T, S], added to the scores of all heads.
        tp: the contractions.

    Returns:
        float32 [B, K*G, T, H].
    """
    B, N, T, H = q.shape
    K, S = k.shape[1], k.shape[3]
    scores = tp.scores(q.reshape(B, K, N // K * T, H), k).reshape(B, K, N // K, T, S)
    scores = scores + bias[:, None, None]
    weights = tp.pointwise(jnp.exp, scores - scores.max(axis=-1, keepdims=True))
    y, total = tp.weighted_values(weights.reshape(B, K, N // K * T, S), v)
    return (y / total).reshape(B, N, T, H)


def mlp(weights: Params, x: Array, tp: TensorParallel) -> Array:
    """SwiGLU (arXiv 2002.05202): [B, T, D] -> [B, T, D]."""
    gate = tp.column(x, weights["gate_proj"]["weight"])
    up = tp.column(x, weights["up_proj"]["weight"])
    return tp.row(tp.pointwise(jax.nn.silu, gate) * up, weights["down_proj"]["weight"])


def rms_norm(x: Array, weight: Array, eps: float, tp: TensorParallel) -> Array:
    """Root-mean-square norm (arXiv 1910.07467) over the last axis, in float32."""
    scale = tp.pointwise(jax.lax.rsqrt, tp.mean_square(x) + eps)
    return x * scale * weight.astype(jnp.float32)


def rotary_tables(config: ModelConfig, positions: Array, tp: TensorParallel) -> tuple[Array, Array]:
    """Cosines and sines of the rotary angles: int [B, T] -> two float32 [B, 1, T, H/2]."""
    frequencies, attention_factor = inverse_frequencies(config)
    (angles,) = tp.rounded((positions[:, None, :, None].astype(jnp.float32) * frequencies,))
    cos, sin = tp.pointwise(jnp.cos, angles), tp.pointwise(jnp.sin, angles)
    # Without the barrier XLA computes them anew in every layer, where they are used.
    return jax.lax.optimization_barrier((cos * attention_factor, sin * attention_factor))


def rotate(x: Array, rotary: tuple[Array, Array], tp: TensorParallel) -> Array:
    """Rotary embedding (arXiv 2104.09864) of [B, N, T, H]; dimension i pairs with i + H/2."""
    cos, sin = rotary
    first, second = jnp.split(x, 2, axis=-1)
    a, b, c, d = tp.rounded((first * cos, second * sin, second * cos, first * sin))
    return jnp.concatenate([a - b, c + d], axis=-1)


def _seen(positions: Array, slots: int, config: ModelConfig, layer_type: str) -> Seen:
    """What a layer's queries at `positions` [B, T] see.

    A bias is a number to add, not a mask to select by: XLA's CPU back end (jax 0.10) takes half the
    time for the softmax of a decode step's 32 rows of 512 scores that way.
    """
    window = config.sliding_window if layer_type == "sliding_attention" else None
    window = window or jnp.iinfo(jnp.int32).max
    query, key = positions[:, :, None], jnp.arange(slots)
    mask = (key <= query) & (query - key < window)
    bias = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)
    return Seen(positions[:, 0], jnp.int32(window), bias)


def _at(x: Array, wanted: Array | None, axis: int) -> Array:
    """Of each row [B, ...] the wanted one of an axis, which has length 1 then; None: all."""
    if wanted is None:
        return x
    return jnp.take_along_axis(x, wanted.reshape(-1, *[1] * (x.ndim - 1)), axis)


def _split_heads(x: Array, head_dim: int) -> Array:
    """[B, T, N*H] -> [B, N, T, H]."""
    return x.reshape(*x.shape[:2], -1, head_dim).swapaxes(1, 2)


def _merge_heads(x: Array) -> Array:
    """[B, N, T, H] -> [B, T, N*H]."""
    B, N, T, H = x.shape
    return x.swapaxes(1, 2).reshape(B, T, N * H)
