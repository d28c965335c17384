# SPDX-License-Identifier: Apache-2.0
"""tunix's Qwen2 in a jitted step whose cache is donated, as its sampler runs it."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.models.qwen2.model import ModelConfig
from tunix.models.qwen2.params import create_model_from_safe_tensors
from worker import WARM_UP, median_seconds


class Tunix:
    def __init__(self, model: str, dtype: str, sequences: int):
        del sequences  # A cache has as many as are asked for.
        self.dtype = jnp.dtype(dtype)
        self.config = _config(json.loads((Path(model) / "config.json").read_text()), self.dtype)
        auto = (jax.sharding.AxisType.Auto,) * 2
        mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=auto)
        loaded = create_model_from_safe_tensors(model, self.config, mesh, self.dtype)
        graph, self.weights = nnx.split(loaded)
        self.step = jax.jit(partial(_step, graph), donate_argnums=1)

    def decode(self, batch: int, length: int, steps: int) -> float:
        cache = self._cache(batch, length + steps + WARM_UP)
        prompt = np.ones((batch, length), np.int32)
        tokens, cache = self.step(self.weights, cache, prompt, np.int32(0))
        place = length

        def step() -> None:
            nonlocal tokens, cache, place
            tokens, cache = self.step(self.weights, cache, tokens[:, None], np.int32(place))
            tokens, place = np.asarray(tokens), place + 1

        return median_seconds(step, steps)

    def prefill(self, length: int, runs: int) -> float:
        prompt = np.ones((1, length), np.int32)

        def read() -> None:
            tokens, _ = self.step(self.weights, self._cache(1, length), prompt, np.int32(0))
            np.asarray(tokens)

        return median_seconds(read, runs)

    def _cache(self, batch: int, length: int) -> dict:
        shape = batch, length, self.config.num_kv_heads, self.config.head_dim
        return {
            f"layer_{layer}": {
                "k": jnp.zeros(shape, self.dtype),
                "v": jnp.zeros(shape, self.dtype),
                "end_index": jnp.zeros(batch, jnp.int32),
            }
            for layer in range(self.config.num_layers)
        }


def _step(graph, weights, cache, tokens, start):
    """The likeliest tokens [B] after `tokens` [B, T], which begin at position `start`."""
    batch, length = tokens.shape
    positions = jnp.broadcast_to(start + jnp.arange(length), (batch, length))
    seen = jnp.arange(cache["layer_0"]["k"].shape[1]) <= positions[..., None]
    logits, cache = nnx.merge(graph, weights)(tokens, positions, cache, seen)
    return logits[:, -1].argmax(axis=-1), cache


def _config(config: dict, dtype: jnp.dtype) -> ModelConfig:
    heads = config["num_attention_heads"]
    return ModelConfig(
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_heads=heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        num_kv_heads=config["num_key_value_heads"],
        rope_theta=config["rope_theta"],
        norm_eps=config["rms_norm_eps"],
        use_tied_embedding=config["tie_word_embeddings"],
        dtype=dtype,
        param_dtype=dtype,
    )


load = Tunix
