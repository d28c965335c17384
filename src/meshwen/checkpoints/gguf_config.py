# SPDX-License-Identifier: Apache-2.0
"""What the metadata of a GGUF file says, in the words of Hugging Face's JSON files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Required, cast

import numpy as np
from typing_extensions import TypedDict

from meshwen.checkpoints.base import TensorSource
from meshwen.checkpoints.dimensions import check_dimensions
from meshwen.checkpoints.gguf_names import LAYER_NAMES
from meshwen.common.json_files import Finite, check_shape, shown
from meshwen.errors import MeshwenError
from meshwen.models.config import ModelConfig
from meshwen.models.registry import config_from_dict

# What is needed of the metadata: keys of the architecture, such as `qwen2.block_count`, and others.
# All else may be anything. `meshwen.tokenizer.files` declares the tokenizer's part.
_OWN_KEYS = {
    "embedding_length": Required[int],
    "feed_forward_length": Required[int],
    "block_count": Required[int],
    "context_length": Required[int],
    "attention.head_count": Required[int],
    "attention.head_count_kv": Required[int],
    "attention.layer_norm_rms_epsilon": Required[Finite],
    "attention.key_length": int,
    "attention.value_length": int,
    "attention.causal": bool,
    "rope.dimension_count": int,
    "rope.freq_base": Finite,
    "rope.scale_linear": Finite,
    "rope.scaling.type": str,
    "rope.scaling.factor": Finite,
    "rope.scaling.original_context_length": int,
    "rope.scaling.attn_factor": Finite,
    "rope.scaling.yarn_attn_factor": Finite,
    "rope.scaling.yarn_ext_factor": Finite,
    "rope.scaling.yarn_beta_fast": Finite,
    "rope.scaling.yarn_beta_slow": Finite,
}
_OTHER_KEYS = {
    "general.sampling.temp": Finite,
    "general.sampling.top_k": int,
    "general.sampling.top_p": Finite,
    "general.sampling.min_p": Finite,
    "general.sampling.penalty_repeat": Finite,
    "tokenizer.ggml.tokens": list[str],
    "tokenizer.ggml.eos_token_id": int,
    "tokenizer.ggml.eot_token_id": int,
}

# What a config.json calls keys of the architecture, and others.
_CONFIG_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
}
_TOKEN_KEYS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
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

    Raises MeshwenError, which names the file and the key, when it has not, and when the model's
    architecture is not supported.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in LAYER_NAMES:
        raise MeshwenError(
            f"{path}: its architecture is {shown(architecture)}, which is not supported; "
            f"supported: {', '.join(LAYER_NAMES)}"
        )
    check_shape(metadata, _shape(architecture), str(path), hint="download it again")
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    try:
        data = _config_dict(architecture, own, metadata, tensors)
        config = config_from_dict(data, name=name, where=str(path))
        _check_heads(own, config)
        check_dimensions(config, tensors, nbytes, path)
    except MeshwenError as error:
        message = str(error).removeprefix(f"{path}: ")
        raise MeshwenError(f"{path}: {_in_gguf_words(message, architecture)}") from None
    return config


@cache
def _shape(architecture: str) -> type[dict[str, Any]]:
    """What the metadata of an architecture must be, as a TypedDict."""
    own = {f"{architecture}.{key}": kind for key, kind in _OWN_KEYS.items()}
    make: Any = TypedDict  # mypy wants the keys as a literal.
    return cast(type[dict[str, Any]], make("GgufMetadata", own | _OTHER_KEYS, total=False))


def _in_gguf_words(message: str, architecture: str) -> str:
    """A message about a config.json with the file's own keys in it."""
    names = {key: f"{architecture}.{own}" for key, own in _CONFIG_KEYS.items()} | _TOKEN_KEYS
    for key, theirs in names.items():
        message = re.sub(rf"\b{key}\b", theirs, message)
    return message


def _config_dict(
    architecture: str,
    own: Mapping[str, Any],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, TensorSource],
) -> dict[str, Any]:
    """What a GGUF file says about the model, in the words of a config.json.

    Args:
        architecture: the file's.
        own: the architecture's metadata, by key without `qwen2.`.
        metadata: all of it.
        tensors: by Hugging Face name.
    """
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise MeshwenError("it has no token_embd.weight: it is not a whole model")
    config = {
        "model_type": architecture,
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": embedding.dtype.name,
        "rope_theta": 10000.0,  # llama.cpp's default.
        "rope_scaling": _rope_scaling(architecture, own),
    }
    given = {name: own.get(key) for name, key in _CONFIG_KEYS.items()}
    given |= {name: metadata.get(key) for name, key in _TOKEN_KEYS.items()}
    return config | {name: _number(value) for name, value in given.items() if value is not None}


def _check_heads(own: Mapping[str, Any], config: ModelConfig) -> None:
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, config.head_dim) != config.head_dim:
            raise MeshwenError(
                f"its {config.model_type}.{key} is {own[key]}, and its heads have "
                f"{config.head_dim} dimensions, which is not supported"
            )
    if own.get("attention.causal", True) is not True:
        raise MeshwenError(
            f"its {config.model_type}.attention.causal is false, which is not supported"
        )


# They change the result in ways that transformers has no name for.
_ONLY_ONE = (
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scale_linear",
)


def _rope_scaling(architecture: str, own: Mapping[str, Any]) -> dict[str, Any] | None:
    for key in _ONLY_ONE:
        if own.get(key, 1.0) != 1.0:
            raise MeshwenError(f"its {architecture}.{key} is not 1, which is not supported")
    kind = own.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    names = {
        "factor": "factor",
        "original_max_position_embeddings": "original_context_length",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }
    given = {name: own.get(f"rope.scaling.{key}") for name, key in names.items()}
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
            "(tokenizer.ggml.pre): text is split as Qwen2 does",
        )
    return ()


def _number(value: float) -> float:
    """The value, or for a float32 the shortest decimal that is the same float32."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
