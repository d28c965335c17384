# SPDX-License-Identifier: Apache-2.0
"""What decoder-only models share: embedding, the run through the layers, attention, MLP, logits.

Written for one device. On a mesh each device runs it under `shard_map` with its own part of the
weights, heads and cache; devices meet in the contractions of `meshwen.ops.operations.Ops` and
nowhere else.

Dimensions: B batch, T query tokens, S key positions, D hidden size, F intermediate size,
K key/value heads of this device, G query heads for each, N query heads (or those of any kind),
H head_dim, V vocabulary of this device. *tokens stands for B T where tokens are in rows, and for
one axis where they are those of a step, one sequence behind the other; *asked for the same, but of
the tokens alone that are asked for.

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

from meshwen.cache.kv_cache import LayerCache
from meshwen.models.config import ModelConfig
from meshwen.models.rope_frequencies import inverse_frequencies
from meshwen.ops.attention import CausalMask, RowTokens
from meshwen.ops.operations import Ops
from meshwen.ops.paged import PagedMask, PagedTokens
from meshwen.ops.rotary import Rotary, rotary_tables
from meshwen.weights.declaration import Params

# What names of compiled operations have of a layer's.
LAYER_SCOPE = "decoder_layer"


class Context(NamedTuple):
    """Where tokens are, and to which keys they attend.

    Layers of one kind (full or sliding attention) share it.
    """

    mask: CausalMask | PagedMask
    rotary: Rotary

    def at(self, last: Int32[Array, " B"] | None) -> Context:
        """Of the tokens that are asked for; None: of all."""
        if last is None:
            return self
        rotary = Rotary(*(self.selected(table, last) for table in self.rotary))
        return Context(self.mask.at(last), rotary)

    def selected(
        self, x: Shaped[Array, "*tokens _"], last: Int32[Array, " B"] | None
    ) -> Shaped[Array, "*asked _"]:
        """What is asked for of the tokens: of each row one; or some of a step's. None: all."""
        if last is None:
            return x
        if isinstance(self.mask, PagedMask):
            return x[last]
        return jnp.take_along_axis(x, last.reshape(-1, *[1] * (x.ndim - 1)), axis=1)


@runtime_checkable  # For checks of shapes.
class Attention(Protocol):
    """An architecture's self-attention, of this device's heads."""

    def __call__(
        self,
        weights: Params,
        x: Float32[Array, "*tokens D"],
        context: Context,
        cache: LayerCache | None,
        last: Int32[Array, " B"] | None,
        config: Any,
        ops: Ops,
    ) -> tuple[Float32[Array, "*asked D"], LayerCache | None]:
        """What is added to the residual stream, and the cache with the tokens' keys and values.

        With `last`, keys and values are of all tokens, the rest of those alone.
        """


def hidden_states(
    params: Params,
    token_ids: Int32[Array, "*tokens"],
    tokens: RowTokens | PagedTokens,
    cache: tuple[LayerCache, ...] | None,
    config: ModelConfig,
    ops: Ops,
    attention: Attention,
    last: Int32[Array, " B"] | None = None,
) -> tuple[Float32[Array, "*asked D"], tuple[LayerCache, ...]]:
    """The final hidden states, normalised.

    Args:
        params: this device's weights.
        token_ids: the tokens.
        tokens: where they are: in rows of a batch, or one sequence behind the other.
        cache: keys and values of earlier tokens, to which the tokens' own are added: rows, or KV
            blocks. None (of rows alone): there are none, and the tokens begin at position 0.
        config: the model's hyperparameters.
        ops: the operations.
        attention: the architecture's.
        last: the tokens whose states are asked for, by their index in their row, one of each, or
            among all: of the others the last layer computes keys and values alone. None: all are.

    Returns:
        The states, and the updated cache; () without one.
    """
    model = params["model"]
    contexts = _contexts(tokens, config, ops)
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
    x: Float32[Array, "*tokens D"],
    context: Context,
    cache: LayerCache | None,
    last: Int32[Array, " B"] | None,
    *,
    attention: Attention,
    config: ModelConfig,
    ops: Ops,
) -> tuple[Float32[Array, "*asked D"], LayerCache | None]:
    """One pre-norm layer: the residual stream after it, and the cache with the tokens' own."""
    h = ops.rms_norm(x, weights["input_layernorm"], config.rms_norm_eps)
    h, cache = attention(weights["self_attn"], h, context, cache, last, config, ops)
    x = context.selected(x, last) + h
    h = ops.rms_norm(x, weights["post_attention_layernorm"], config.rms_norm_eps)
    return x + mlp(weights["mlp"], h, ops), cache


def queries_keys_values(
    weights: Params,
    x: Float32[Array, "*tokens D"],
    asked: Float32[Array, "*asked D"],
    head_dim: int,
    ops: Ops,
) -> tuple[
    Float32[Array, "*asked N {head_dim}"],
    Float32[Array, "*tokens K {head_dim}"],
    Float32[Array, "*tokens K {head_dim}"],
]:
    """The three projections, by heads: queries of the tokens alone that are asked for."""
    rows = {"q_proj": asked, "k_proj": x, "v_proj": x}
    q, k, v = (_split_heads(ops.column(of, weights[n]), head_dim) for n, of in rows.items())
    return q, k, v


def logits(params: Params, x: Float32[Array, "*tokens D"], ops: Ops) -> Float32[Array, "*tokens V"]:
    """This device's part of the vocabulary's logits.

    Positions of the vocabulary that are padding get the logit 0, as their weights are zero.
    """
    return ops.logits(x, params.get("lm_head", params["model"]["embed_tokens"]))


def attend(
    q: Float32[Array, "*asked N H"],
    k: Float32[Array, "*tokens K H"],
    v: Float32[Array, "*tokens K H"],
    context: Context,
    cache: LayerCache | None,
    ops: Ops,
    dtype: jnp.dtype,
    last: Int32[Array, " B"] | None = None,
) -> tuple[Float32[Array, "*asked N*H"], LayerCache | None]:
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
    mask = context.at(last).mask
    if isinstance(mask, PagedMask):
        assert isinstance(context.mask, PagedMask)
        assert cache is not None, "tokens of a step have KV blocks"
        slots = context.mask.tokens.slots
        cache = LayerCache(*ops.backend.write_blocks(cache, (k, v), slots))
        y = ops.attend_blocks(q, *cache, mask)
    else:
        assert isinstance(context.mask, CausalMask)
        own = LayerCache.of(k, v, ops.backend.cache_layout)
        cache = None if cache is None else cache.written(own, context.mask.start, ops.backend)
        # The tokens' own keys are all that there are where nothing came before.
        held = own if cache is None or mask.length == k.shape[1] else cache
        y = ops.attend(q.swapaxes(1, 2), held, mask).swapaxes(1, 2)
    return y.reshape(*y.shape[:-2], -1), cache


def mlp(weights: Params, x: Float32[Array, "*tokens D"], ops: Ops) -> Float32[Array, "*tokens D"]:
    """SwiGLU (arXiv 2002.05202)."""
    gate, up = ops.column(x, weights["gate_proj"]), ops.column(x, weights["up_proj"])
    return ops.row(ops.silu(gate) * up, weights["down_proj"])


def _split_heads(
    x: Float32[Array, "*tokens NH"], head_dim: int
) -> Float32[Array, "*tokens N {head_dim}"]:
    """Heads that are one behind the other as an axis."""
    return x.reshape(*x.shape[:-1], -1, head_dim)


def _contexts(tokens: RowTokens | PagedTokens, config: ModelConfig, ops: Ops) -> dict[str, Context]:
    """The context of each kind of layer."""
    positions = tokens.positions
    rotary = rotary_tables(positions, *inverse_frequencies(config), ops)
    found = {}
    for kind in set(config.layer_types):
        window = config.sliding_window if kind == "sliding_attention" else None
        most = jnp.int32(window or jnp.iinfo(jnp.int32).max)
        mask: CausalMask | PagedMask
        if isinstance(tokens, PagedTokens):
            mask = PagedMask(tokens, most)
        else:
            array = ops.backend.mask(positions, most, tokens.length)
            mask = CausalMask(tokens.start, most, tokens.length, array)
        found[kind] = Context(mask, rotary)
    return found
