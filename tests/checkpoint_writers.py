# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints for the tests: one layer of random weights."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, settings
from safetensors.numpy import save_file

from meshwen.models.qwen2 import Qwen2Config

# A property is about values, not about how busy the machine is.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

HIDDEN, INTERMEDIATE, VOCAB, KV = 64, 96, 50, 32

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

_LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (VOCAB, HIDDEN),
    _LAYER + "input_layernorm.weight": (HIDDEN,),
    _LAYER + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    _LAYER + "self_attn.q_proj.bias": (HIDDEN,),
    _LAYER + "self_attn.k_proj.weight": (KV, HIDDEN),
    _LAYER + "self_attn.k_proj.bias": (KV,),
    _LAYER + "self_attn.v_proj.weight": (KV, HIDDEN),
    _LAYER + "self_attn.v_proj.bias": (KV,),
    _LAYER + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    _LAYER + "post_attention_layernorm.weight": (HIDDEN,),
    _LAYER + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
    _LAYER + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
    _LAYER + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCAB, HIDDEN),
}


def random_weights(seed: int = 0, dtype: type = ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_folder(folder: Path, weights: dict[str, np.ndarray] | None = None) -> Path:
    """A Hugging Face folder; with `weights`, in model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", CONFIG)
    if weights is not None:
        save_file(weights, folder / "model.safetensors")
    return folder


def write_model(folder: Path, config: Qwen2Config, weights: dict[str, np.ndarray]) -> Path:
    """A Hugging Face folder of any config."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config.to_dict())
    save_file(weights, folder / "model.safetensors")
    return folder


def write_sharded(folder: Path, weights: dict[str, np.ndarray], shards: int = 2) -> Path:
    """A Hugging Face folder with the weights dealt out over shards, and their index."""
    write_folder(folder)
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: weights[key] for key in list(weights)[i::shards]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return folder


def same_bits(found: np.ndarray, expected: np.ndarray) -> bool:
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and found.tobytes() == expected.tobytes()
    )


def gguf_name(name: str) -> str:
    """The name that llama.cpp's converter gives a Hugging Face tensor of this tiny model."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem in whole:
        return f"{whole[stem]}.{kind}"
    part = stem.removeprefix(_LAYER).removeprefix("self_attn.").removeprefix("mlp.")
    part = part.removesuffix("_proj")
    renamed = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "o": "attn_output",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    }
    return f"blk.0.{renamed.get(part, 'attn_' + part)}.{kind}"


def write_gguf(
    path: Path,
    tensors: dict[str, tuple[np.ndarray, object]],
    *,
    architecture: str = "qwen2",
    extra: object = None,
) -> Path:
    """A GGUF file with the metadata of CONFIG. `tensors`: GGUF name -> (array, raw type or None).

    `extra(writer)` may add metadata.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    if extra is not None:
        extra(writer)
    for name, (array, raw_type) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def float_gguf_tensors(seed: int = 0) -> dict[str, tuple[np.ndarray, None]]:
    weights = random_weights(seed, np.float32)
    return {gguf_name(name): (array, None) for name, array in weights.items()}
