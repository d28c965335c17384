# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face ``config.json``: what it may hold, and the hyperparameters that it states.

Field names and meanings are those of transformers' configs. The spellings of transformers 4
(``rope_theta``, ``rope_scaling``, ``torch_dtype``) and 5 (``rope_parameters``, ``dtype``) are both
read. What this package cannot run exactly is refused, never guessed.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Required, cast

from typing_extensions import TypedDict

from meshwen.common.json_files import Finite, check_shape, read_json, shown
from meshwen.common.paths import exists, user_path
from meshwen.errors import MeshwenError
from meshwen.models.rope_scaling import RopeFile, read_rope

LAYER_TYPES = ("full_attention", "sliding_attention")
MOST_LAYERS = 2**12  # A hundred times what has been published.


class _Head(TypedDict, total=False):
    """What names the architecture in a config.json."""

    architectures: list[str] | str | None
    model_type: str | None


class _DualChunk(TypedDict, total=False):
    original_max_position_embeddings: int


class ConfigFile(TypedDict, total=False):
    """What the model needs of a config.json. Other keys, and their values, may be anything."""

    vocab_size: Required[int]
    hidden_size: Required[int]
    intermediate_size: Required[int]
    num_hidden_layers: Required[int]
    num_attention_heads: Required[int]
    num_key_value_heads: Required[int | None]
    head_dim: int | None
    max_position_embeddings: Required[int]
    dual_chunk_attention_config: _DualChunk | None
    original_max_position_embeddings: int | None
    rms_norm_eps: Required[Finite]
    rope_theta: Finite | None
    rope_scaling: RopeFile | None
    rope_parameters: RopeFile | None
    partial_rotary_factor: Finite | None
    tie_word_embeddings: bool | None
    use_sliding_window: bool | None
    layer_types: list[str] | None
    eos_token_id: int | list[int] | None


class _SlidingFile(TypedDict, total=False):
    """What is needed besides where layers may slide."""

    sliding_window: Required[int | None]
    max_window_layers: int | None


def config_file(path: str | Path) -> Path:
    """The ``config.json`` of a folder, or the file itself; MeshwenError when it is not there."""
    path = user_path(path)
    folder = exists(path) and path.is_dir()
    file = path / "config.json" if folder else path
    if not exists(file):
        if folder:
            raise MeshwenError(f"{path}: the folder has no config.json")
        raise MeshwenError(f"{path}: no such file or folder")
    return file


def read_config(file: Path) -> dict[str, Any]:
    """The object in a ``config.json``. Raises MeshwenError when there is none."""
    return read_json(file, dict[str, Any])


def folder_name(file: Path) -> str:
    """The name of the folder that holds a file."""
    return os.path.basename(os.path.dirname(os.path.abspath(file)))


def named_architecture(data: Mapping[str, Any], where: str) -> tuple[list[str], str | None]:
    """``architectures`` and ``model_type`` of a config.json; MeshwenError where it has neither."""
    head = {key: data[key] for key in ("architectures", "model_type") if key in data}
    head = check_shape(head, cast(type[dict[str, Any]], _Head), where)
    names, model_type = head.get("architectures") or [], head.get("model_type")
    if not names and model_type is None:
        raise MeshwenError(f"{where}: neither architectures nor model_type is given")
    return [names] if isinstance(names, str) else names, model_type


def declared_quantization(data: Mapping[str, Any]) -> str | None:
    """What ``quantization_config`` names; None where it is empty.

    It may be left over from a copy whose weights are floating-point again, as the tensors show.
    """
    declared = data.get("quantization_config")
    if not declared:
        return None
    method = declared.get("quant_method") if isinstance(declared, Mapping) else declared
    return method if isinstance(method, str) else "unnamed"


def checked_config(data: Mapping[str, Any], where: str) -> ConfigFile:
    """The contents of a ``config.json`` of a model that this package computes.

    Raises MeshwenError: a key is missing, a value has the wrong type, or a setting is not
    implemented.
    """
    _refuse_unsupported(data, where)
    return check_shape(cast(ConfigFile, data), ConfigFile, where)


def hyperparameters(data: ConfigFile) -> dict[str, Any]:
    """Fields of a `ModelConfig`, those of sliding attention left out.

    Raises MeshwenError, without the file's name: RoPE scaling, or dual chunk attention, is not
    implemented or lacks a setting.
    """
    whole: Mapping[str, Any] = data  # Its other keys too, whose values may be anything.
    max_positions = _max_positions(data)
    rope_theta, rope_scaling = read_rope(whole, max_positions)
    return {
        "vocab_size": data["vocab_size"],
        "hidden_size": data["hidden_size"],
        "intermediate_size": data["intermediate_size"],
        "num_hidden_layers": data["num_hidden_layers"],
        "num_attention_heads": data["num_attention_heads"],
        "num_key_value_heads": _or(data["num_key_value_heads"], data["num_attention_heads"]),
        "head_dim": _or(data.get("head_dim"), 0),
        "max_position_embeddings": max_positions,
        "rms_norm_eps": float(data["rms_norm_eps"]),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": bool(data.get("tie_word_embeddings")),
        "bos_token_id": _token_id(whole.get("bos_token_id")),
        "eos_token_id": _token_ids(data.get("eos_token_id")),
        "pad_token_id": _token_id(whole.get("pad_token_id")),
        "torch_dtype": _dtype(whole),
    }


def sliding_attention(data: Mapping[str, Any], where: str) -> tuple[int | None, tuple[str, ...]]:
    """Return (sliding_window, layer_types) by the rule of transformers' Qwen2Config.

    The first ``max_window_layers`` layers attend to everything and the ones above slide, unless
    ``layer_types`` says which do.
    """
    window, slides = None, bool(data.get("use_sliding_window"))
    if slides:
        window = check_shape(cast(_SlidingFile, data), _SlidingFile, where)["sliding_window"]
    if (given := data.get("layer_types")) is not None:
        if not given:
            raise MeshwenError(
                f"{where}: layer_types is empty; leave it out or give one entry per layer"
            )
        return window, tuple(given)
    if window is None:
        return None, ()
    if data.get("max_window_layers") is None:
        raise MeshwenError(f"{where}: max_window_layers is missing")
    layers = data["num_hidden_layers"]
    if layers > MOST_LAYERS:  # What is refused, and is not to size anything.
        return window, ()
    full = min(max(data["max_window_layers"], 0), layers)
    return window, LAYER_TYPES[:1] * full + LAYER_TYPES[1:] * (layers - full)


def _refuse_unsupported(data: Mapping[str, Any], where: str) -> None:
    """Raise MeshwenError for a config whose model would not be the one this package computes."""
    activation = data.get("hidden_act")
    if activation not in (None, "silu"):
        raise MeshwenError(
            f'{where}: hidden_act {shown(activation)} is not supported; supported: "silu"'
        )
    if data.get("is_causal") not in (None, True):
        raise MeshwenError(f"{where}: is_causal false (bidirectional attention) is not supported")


def _max_positions(data: ConfigFile) -> int:
    """Return the context length; without dual chunk attention, the one before its extension.

    Qwen2.5-1M checkpoints declare 1010000 positions but reach beyond 262144 only by dual chunk
    attention (arXiv 2402.17463), which is plain attention up to there and not implemented here.
    """
    positions, dual_chunk = data["max_position_embeddings"], data.get("dual_chunk_attention_config")
    if not dual_chunk:
        return positions
    if "original_max_position_embeddings" not in dual_chunk:
        raise MeshwenError(
            "dual_chunk_attention_config.original_max_position_embeddings is missing"
        )
    return min(positions, dual_chunk["original_max_position_embeddings"])


def _dtype(data: Mapping[str, Any]) -> str:
    """Return the checkpoint's dtype; both keys present: ``dtype`` wins, as in transformers.

    The files' tensors have the last word on it, so it may be anything.
    """
    value = data.get("dtype") or data.get("torch_dtype")
    return value.removeprefix("torch.") if isinstance(value, str) else "float32"


def _token_id(value: Any) -> int | None:
    """Return an id that no computation needs: None where it is none."""
    return value if type(value) is int and 0 <= value < 2**31 else None


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
