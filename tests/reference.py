# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and Qwen3 in float64 numpy, to be obviously right: one sequence, head, query at a time.

Deliberately unlike meshwen.models: weights are `[out, in]` as in a checkpoint, rotations are
complex numbers, key/value heads are picked one by one, and what a query sees is a list of
positions.
"""

import math

import numpy as np

from meshwen.models.config import ModelConfig
from meshwen.models.rope_scaling import RopeScaling


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, by Hugging Face name."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        for name, size in (("q", query), ("k", kv), ("v", kv)):
            shapes[layer + f"self_attn.{name}_proj.weight"] = (size, hidden)
            if config.model_type == "qwen2":
                shapes[layer + f"self_attn.{name}_proj.bias"] = (size,)
        if config.model_type == "qwen3":
            for name in ("q_norm", "k_norm"):
                shapes[layer + f"self_attn.{name}.weight"] = (config.head_dim,)
        shapes[layer + "self_attn.o_proj.weight"] = (hidden, query)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        shapes[layer + "mlp.gate_proj.weight"] = (mlp, hidden)
        shapes[layer + "mlp.up_proj.weight"] = (mlp, hidden)
        shapes[layer + "mlp.down_proj.weight"] = (hidden, mlp)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 weights that make attention sharp, biases matter and every norm differ from 1."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = rng.standard_normal(shape)
        if "norm" in name:
            return 1 + 0.3 * values
        if name.endswith("bias"):
            return 0.5 * values
        if "embed_tokens" in name:
            return values
        return values * (1.5 / math.sqrt(shape[1]))

    return {
        name: draw(name, shape).astype(np.float32) for name, shape in tensor_shapes(config).items()
    }


def logits(weights: dict[str, np.ndarray], config: ModelConfig, token_ids: list[int]) -> np.ndarray:
    """Logits of one sequence: float64 [T, V]."""
    return activations(weights, config, token_ids)["lm_head"]


def activations(
    weights: dict[str, np.ndarray], config: ModelConfig, token_ids: list[int]
) -> dict[str, np.ndarray]:
    """What each module of Hugging Face's model gives for one sequence: float64 [T, D] or [T, V]."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x = np.stack([w["model.embed_tokens.weight"][token] for token in token_ids])
    found = {"model.embed_tokens": x}
    for i in range(config.num_hidden_layers):
        layer = {k.split(".", 3)[3]: v for k, v in w.items() if k.startswith(f"model.layers.{i}.")}
        sliding = config.layer_types[i] == "sliding_attention"
        window = config.sliding_window if sliding else None
        h = _norm(x, layer["input_layernorm.weight"], config.rms_norm_eps)
        attention = _attention(layer, h, config, window)
        x = x + attention
        normed = _norm(x, layer["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = normed @ layer["mlp.gate_proj.weight"].T
        up = normed @ layer["mlp.up_proj.weight"].T
        mlp = (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down_proj.weight"].T
        x = x + mlp
        name = f"model.layers.{i}"
        found |= {f"{name}.input_layernorm": h, f"{name}.self_attn": attention}
        found |= {f"{name}.post_attention_layernorm": normed, f"{name}.mlp": mlp, name: x}
    x = _norm(x, w["model.norm.weight"], config.rms_norm_eps)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return {**found, "model.norm": x, "lm_head": x @ w[head].T}


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return np.stack([row / math.sqrt(row @ row / len(row) + eps) for row in x]) * weight


def _attention(
    layer: dict[str, np.ndarray], x: np.ndarray, config: ModelConfig, window: int | None
) -> np.ndarray:
    size = config.head_dim
    queries_per_key = config.num_attention_heads // config.num_key_value_heads
    turns, scale = _frequencies(config)
    spin = scale * np.exp(1j * np.arange(len(x))[:, None] * turns)

    def head(name: str, index: int) -> np.ndarray:
        rows = slice(index * size, (index + 1) * size)
        values = x @ layer[f"self_attn.{name}_proj.weight"][rows].T
        if (bias := layer.get(f"self_attn.{name}_proj.bias")) is not None:
            values = values + bias[rows]
        if (norm := layer.get(f"self_attn.{name}_norm.weight")) is not None:
            values = _norm(values, norm, config.rms_norm_eps)
        return values

    def turned(values: np.ndarray) -> np.ndarray:
        z = (values[:, : size // 2] + 1j * values[:, size // 2 :]) * spin
        return np.concatenate([z.real, z.imag], axis=1)

    outputs = []
    for n in range(config.num_attention_heads):
        q = turned(head("q", n))
        k = turned(head("k", n // queries_per_key))
        v = head("v", n // queries_per_key)
        output = np.zeros_like(q)
        for t in range(len(x)):
            seen = [s for s in range(t + 1) if window is None or s > t - window]
            scores = np.array([q[t] @ k[s] / math.sqrt(size) for s in seen])
            weights = np.exp(scores - scores.max())
            output[t] = weights / weights.sum() @ v[seen]
        outputs.append(output)
    return np.concatenate(outputs, axis=1) @ layer["self_attn.o_proj.weight"].T


def _frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Radians a position for each pair of dimensions, and the factor on cosine and sine."""
    half = config.head_dim // 2
    plain = np.array([config.rope_theta ** (-i / half) for i in range(half)])
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    if scaling.rope_type == "linear":
        return plain / scaling.factor, 1.0
    blended = [_yarn(frequency, i, scaling, config) for i, frequency in enumerate(plain)]
    return np.array(blended), 0.1 * math.log(scaling.factor) + 1


def _yarn(frequency: float, pair: int, scaling: RopeScaling, config: ModelConfig) -> float:
    """Section 3.2 of arXiv 2309.00071; edges are rounded to whole pairs, as transformers does."""

    def edge(turns: float) -> float:
        wavelength = scaling.original_max_position_embeddings / turns
        return config.head_dim / 2 * math.log(wavelength / (2 * math.pi), config.rope_theta)

    low = max(math.floor(edge(scaling.beta_fast)), 0)
    high = min(math.ceil(edge(scaling.beta_slow)), config.head_dim - 1)
    interpolated = min(max((pair - low) / (high - low), 0), 1)
    return frequency * (1 - interpolated) + frequency / scaling.factor * interpolated
