# SPDX-License-Identifier: Apache-2.0
"""What decoder-only models share: embedding, the run through the layers, attention, MLP, logits.

Written for one device. On a mesh each device runs it under `shard_map` with its own part of the
weights, heads and cache; devices meet in the contractions of `meshwen.ops.operations.Ops` and
nowhere else.

Dimensions: B batch, T query tokens, S key positions, D hidden size, F intermediate size,
K key/value heads of this device, G query heads for each, N query heads (or those of any kind),
H head_dim, V vocabulary of this device; t stands for T, or for 1 where only one token of a row is
asked for.

The residual stream, norms, rotations, attention scores and softmax are float32; matmuls with
weights take their inputs in the weights' dtype and accumulate in float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32, Int32, Shaped

from meshwen.cache.kv_cache import AnyCache, LayerCache
from meshwen.models.config import ModelConfig
from meshwen.models.rope_frequencies import inverse_frequencies
from meshwen.ops.attention import CausalMask
from meshwen.ops.cache_layout import HeldKeysValues
from meshwen.ops.operations import Ops
from meshwen.ops.rotary import Rotary, rotary_tables
from meshwen.weights.declaration import Params

# What names of compiled operations have of a layer's.
LAYER_SCOPE = "decoder_layer"


class Context(NamedTuple):
    """Where tokens are, and to which keys they attend.

    Layers of one kind (full or sliding attention) share it.
    """

    mask: CausalMask
    rotary: Rotary

    def at(self, last: Int32[Array, " B"] | None) -> Context:
        """Of each row's one token that is asked for; None: of all."""
        if last is None:
            return self
        rotary = Rotary(*(at_last(table, last, axis=2) for table in self.rotary))
        return Context(self.mask.at(last), rotary)


@runtime_checkable  # For checks of shapes.
class Attention(Protocol):
    """An architecture's self-attention, of this device's heads."""

    def __call__(
        self,
        weights: Params,
        x: Float32[Array, "B T D"],
        context: Context,
        cache: AnyCache | None,
        last: Int32[Array, " B"] | None,
        config: Any,
        ops: Ops,
    ) -> tuple[Float32[Array, "B t D"], AnyCache | None]:
        """What is added to the residual stream, and the cache with the tokens' keys and values.

        With `last`, keys and values are of all tokens, the rest of each row's last one alone.
        """


def hidden_states(
    params: Params,
    token_ids: Int32[Array, "B T"],
    start: Int32[Array, " B"],
    cache: tuple[AnyCache, ...] | None,
    length: int,
    config: ModelConfig,
    ops: Ops,
    attention: Attention,
    last: Int32[Array, " B"] | None = None,
) -> tuple[Float32[Array, "B t D"], tuple[AnyCache, ...]]:
    """The final hidden states, normalised.

    Args:
        params: this device's weights.
        token_ids: tokens that follow one another. Padding stands behind them, where
            none of them attends to it.
        start: the positions of the first ones.
        cache: keys and values of earlier tokens. The tokens' own are written at the positions from
            `start` on. None: there are none, and `start` is 0.
        length: S, the positions from 0 on that tokens may attend to: of the cache, or all T.
        config: the model's hyperparameters.
        ops: the operations.
        attention: the architecture's.
        last: the index of the one token of each row whose state is asked for: of the others the
            last layer computes keys and values alone. None: all are.

    Returns:
        The states, and the updated cache; () without one.
    """
    model = params["model"]
    contexts = _contexts(start, token_ids.shape[1], length, config, ops)
    # Layers of one kind share a trace: 24 of them then lower in the time of one.
    run = jax.jit(partial(decoder_layer, attention=attention, config=config, ops=ops))
    x = ops.embed(token_ids, model["embed_tokens"])
    new_cache = []
    for i, weights in enumerate(model["layers"]):
        asked = last if i == config.num_hidden_layers - 1 else None
        layer_cache = None if cache is None else cache[i]
        with jax.named_scope(LAYER_SCOPE):
            x, layer_cache = run(weights, x, contexts[config.layer_types[i]], layer_cache, asked)
        if layer_cache is not None:
            new_cache.append(layer_cache)
    return ops.rms_norm(x, model["norm"], config.rms_norm_eps), tuple(new_cache)


def decoder_layer(
    weights: Params,
    x: Float32[Array, "B T D"],
    context: Context,
    cache: AnyCache | None,
    last: Int32[Array, " B"] | None,
    *,
    attention: Attention,
    config: ModelConfig,
    ops: Ops,
) -> tuple[Float32[Array, "B t D"], AnyCache | None]:
    """One pre-norm layer: the residual stream after it, and the cache with the tokens' own."""
    h = ops.rms_norm(x, weights["input_layernorm"], config.rms_norm_eps)
    h, cache = attention(weights["self_attn"], h, context, cache, last, config, ops)
    x = at_last(x, last) + h
    h = ops.rms_norm(x, weights["post_attention_layernorm"], config.rms_norm_eps)
    return x + mlp(weights["mlp"], h, ops), cache


def queries_keys_values(
    weights: Params,
    x: Float32[Array, "B T D"],
    last: Int32[Array, " B"] | None,
    head_dim: int,
    ops: Ops,
) -> tuple[
    Float32[Array, "B N t {head_dim}"],
    Float32[Array, "B K T {head_dim}"],
    Float32[Array, "B K T {head_dim}"],
]:
    """The three projections, by heads: queries of the last tokens alone where these are given."""
    rows = {"q_proj": at_last(x, last), "k_proj": x, "v_proj": x}
    q, k, v = (_split_heads(ops.column(of, weights[n]), head_dim) for n, of in rows.items())
    return q, k, v


def logits(params: Params, x: Float32[Array, "*tokens D"], ops: Ops) -> Float32[Array, "*tokens V"]:
    """This device's part of the vocabulary's logits.

    Positions of the vocabulary that are padding get the logit 0, as their weights are zero.
    """
    return ops.logits(x, params.get("lm_head", params["model"]["embed_tokens"]))


def attend(
    q: Float32[Array, "B N t H"],
    k: Float32[Array, "B K T H"],
    v: Float32[Array, "B K T H"],
    context: Context,
    cache: AnyCache | None,
    ops: Ops,
    dtype: jnp.dtype,
    last: Int32[Array, " B"] | None = None,
) -> tuple[Float32[Array, "B t N*H"], AnyCache | None]:
    """Grouped-query attention (arXiv 2305.13245), this device's heads.

    Args:
        q: queries, rotated; with `last`, of those tokens alone.
        k: keys, rotated.
        v: values.
        context: where the tokens are, and to which keys they attend.
        cache: of earlier tokens; None: there are none.
        ops: the operations.
        dtype: what k and v are rounded to, the cache's.
        last: see `hidden_states`.

    Returns:
        What the heads attend to, one behind the other, and the cache with k and v.
    """
    q = q * q.shape[-1] ** -0.5
    k, v = ops.numerics.rounded((k.astype(dtype), v.astype(dtype)))
    own = LayerCache.of(k, v, ops.backend.cache_layout)
    cache = None if cache is None else cache.written(own, context.mask.start, ops.backend)
    mask = context.at(last).mask
    # The tokens' own keys are all that there are where nothing came before.
    held: HeldKeysValues = own if cache is None or mask.length == k.shape[2] else cache
    return _merge_heads(ops.attend(q, held, mask)), cache


def mlp(weights: Params, x: Float32[Array, "B T D"], ops: Ops) -> Float32[Array, "B T D"]:
    """SwiGLU (arXiv 2002.05202)."""
    gate, up = ops.column(x, weights["gate_proj"]), ops.column(x, weights["up_proj"])
    return ops.row(ops.silu(gate) * up, weights["down_proj"])


def _split_heads(x: Float32[Array, "B T NH"], head_dim: int) -> Float32[Array, "B N T {head_dim}"]:
    """Heads that are one behind the other as an axis."""
    return x.reshape(*x.shape[:2], -1, head_dim).swapaxes(1, 2)


def at_last(
    x: Shaped[Array, "B ..."], last: Int32[Array, " B"] | None, axis: int = 1
) -> Shaped[Array, "B ..."]:
    """Of each row the asked-for one of an axis, which has length 1 then; None: all."""
    if last is None:
        return x
    return jnp.take_along_axis(x, last.reshape(-1, *[1] * (x.ndim - 1)), axis)


def _merge_heads(x: Float32[Array, "B N T H"]) -> Float32[Array, "B T N*H"]:
    """Heads one behind the other."""
    B, N, T, H = x.shape
    return x.swapaxes(1, 2).reshape(B, T, N * H)


def _contexts(
    start: Int32[Array, " B"], tokens: int, length: int, config: ModelConfig, ops: Ops
) -> dict[str, Context]:
    """The context of each kind of layer."""
    positions = start[:, None] + jnp.arange(tokens)
    rotary = rotary_tables(positions, *inverse_frequencies(config), ops)
    found = {}
    for kind in set(config.layer_types):
        window = config.sliding_window if kind == "sliding_attention" else None
        window = window or jnp.iinfo(jnp.int32).max
        array = ops.backend.mask(positions, window, length)
        mask = CausalMask(positions[:, 0], jnp.int32(window), length, array)
        found[kind] = Context(mask, rotary)
    return found
