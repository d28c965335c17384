# SPDX-License-Identifier: Apache-2.0
"""What the metadata of a GGUF file says, in the words of Hugging Face's JSON files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Required

import numpy as np
from typing_extensions import TypedDict

from meshwen.checkpoints.base import TensorSource
from meshwen.checkpoints.dimensions import check_dimensions
from meshwen.common.json_files import Finite, check_shape, shown
from meshwen.errors import MeshwenError
from meshwen.models.config import ModelConfig
from meshwen.models.registry import config_from_dict

# What is needed of the metadata; other keys may be anything. `meshwen.tokenizer.files` declares the
# tokenizer's part.
GgufMetadata = TypedDict(
    "GgufMetadata",
    {
        "qwen2.embedding_length": Required[int],
        "qwen2.feed_forward_length": Required[int],
        "qwen2.block_count": Required[int],
        "qwen2.context_length": Required[int],
        "qwen2.attention.head_count": Required[int],
        "qwen2.attention.head_count_kv": Required[int],
        "qwen2.attention.layer_norm_rms_epsilon": Required[Finite],
        "qwen2.attention.key_length": int,
        "qwen2.attention.value_length": int,
        "qwen2.attention.causal": bool,
        "qwen2.rope.dimension_count": int,
        "qwen2.rope.freq_base": Finite,
        "qwen2.rope.scale_linear": Finite,
        "qwen2.rope.scaling.type": str,
        "qwen2.rope.scaling.factor": Finite,
        "qwen2.rope.scaling.original_context_length": int,
        "qwen2.rope.scaling.attn_factor": Finite,
        "qwen2.rope.scaling.yarn_attn_factor": Finite,
        "qwen2.rope.scaling.yarn_ext_factor": Finite,
        "qwen2.rope.scaling.yarn_beta_fast": Finite,
        "qwen2.rope.scaling.yarn_beta_slow": Finite,
        "general.sampling.temp": Finite,
        "general.sampling.top_k": int,
        "general.sampling.top_p": Finite,
        "general.sampling.min_p": Finite,
        "general.sampling.penalty_repeat": Finite,
        "tokenizer.ggml.tokens": list[str],
        "tokenizer.ggml.eos_token_id": int,
        "tokenizer.ggml.eot_token_id": int,
    },
    total=False,
)

_CONFIG_KEYS = {
    "hidden_size": "qwen2.embedding_length",
    "intermediate_size": "qwen2.feed_forward_length",
    "num_hidden_layers": "qwen2.block_count",
    "num_attention_heads": "qwen2.attention.head_count",
    "num_key_value_heads": "qwen2.attention.head_count_kv",
    "max_position_embeddings": "qwen2.context_length",
    "rms_norm_eps": "qwen2.attention.layer_norm_rms_epsilon",
    "head_dim": "qwen2.attention.key_length",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_IN_MESSAGES = _CONFIG_KEYS | {"rope_theta": "qwen2.rope.freq_base"}
_SAMPLING_KEYS = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


def read_metadata(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, TensorSource],
    name: str,
    nbytes: int,
) -> ModelConfig:
    """The config of a GGUF file of so many bytes, once its metadata is known to be as it must.

    Raises MeshwenError, which names the file and the key, when it has not, and when the model is
    not a Qwen2.
    """
    if (architecture := metadata.get("general.architecture")) != "qwen2":
        raise MeshwenError(
            f"{path}: its architecture is {shown(architecture)}; only qwen2 is supported"
        )
    hint = "download it again"
    check_shape(metadata, GgufMetadata, str(path), hint=hint)
    try:
        data = _config_dict(metadata, tensors)
        config = config_from_dict(data, name=name, where=str(path))
        _check_heads(metadata, config)
        check_dimensions(config, tensors, nbytes, path)
    except MeshwenError as error:
        message = str(error).removeprefix(f"{path}: ")
        for key, theirs in _IN_MESSAGES.items():
            message = re.sub(rf"\b{key}\b", theirs, message)
        raise MeshwenError(f"{path}: {message}") from None
    return config


def _config_dict(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorSource]
) -> dict[str, Any]:
    """What a GGUF file says about the model, in the words of a config.json."""
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise MeshwenError("it has no token_embd.weight: it is not a whole model")
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": embedding.dtype.name,
        "rope_theta": _number(metadata.get("qwen2.rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(metadata),
    }
    given = {name: metadata.get(key) for name, key in _CONFIG_KEYS.items()}
    return config | {name: _number(value) for name, value in given.items() if value is not None}


def _check_heads(metadata: Mapping[str, Any], config: ModelConfig) -> None:
    for key in ("qwen2.attention.value_length", "qwen2.rope.dimension_count"):
        if metadata.get(key, config.head_dim) != config.head_dim:
            raise MeshwenError(
                f"its {key} is {metadata[key]}, and its heads have {config.head_dim} dimensions, "
                "which is not supported"
            )
    if metadata.get("qwen2.attention.causal", True) is not True:
        raise MeshwenError("its qwen2.attention.causal is false, which is not supported")


def _rope_scaling(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    prefix = "qwen2.rope.scaling."
    # These change the result in ways that transformers has no name for.
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if metadata.get(prefix + key, 1.0) != 1.0:
            raise MeshwenError(f"its {prefix}{key} is not 1, which is not supported")
    if metadata.get("qwen2.rope.scale_linear", 1.0) != 1.0:
        raise MeshwenError("its qwen2.rope.scale_linear is not 1, which is not supported")
    kind = metadata.get(prefix + "type", "none")
    if kind == "none":
        return None
    names = {
        "factor": "factor",
        "original_max_position_embeddings": "original_context_length",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }
    given = {name: metadata.get(prefix + key) for name, key in names.items()}
    numbers = {name: _number(value) for name, value in given.items() if value is not None}
    return {"rope_type": kind, **numbers}


def generation_dict(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a GGUF file says about sampling, in the words of a generation_config.json.

    Every token that ends a text for llama.cpp ends it here: the end-of-sequence token, the
    end-of-turn token, and ChatML's two by name. A temperature above 0 is to be sampled with.
    """
    ids = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    ids += [tokens.index(text) for text in ("<|im_end|>", "<|endoftext|>") if text in tokens]
    sampling: dict[str, Any] = {
        name: _number(metadata[f"general.sampling.{key}"])
        for name, key in _SAMPLING_KEYS.items()
        if f"general.sampling.{key}" in metadata
    }
    if "temperature" in sampling:
        sampling["do_sample"] = sampling["temperature"] > 0
    ends = list(dict.fromkeys(token for token in ids if token is not None))
    return ({"eos_token_id": ends} if ends else {}) | sampling


def metadata_notes(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """What a user should know about how the metadata is taken."""
    pre = metadata.get("tokenizer.ggml.pre")
    if "tokenizer.ggml.tokens" in metadata and pre in (None, "default"):
        return (
            f"its metadata names {'no' if pre is None else 'a default'} pre-tokenizer "
            "(tokenizer.ggml.pre): text is split as for every Qwen2",
        )
    return ()


def _number(value: float) -> float:
    """The value, or for a float32 the shortest decimal that is the same float32."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
