# SPDX-License-Identifier: Apache-2.0
"""GGUF files: config, tokenizer and quantised weights in one file.

The header is read here: the gguf package's reader makes an array of every string, which takes
seconds and hundreds of megabytes for Qwen's vocabulary. The block formats are the package's own.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from meshwen.checkpoints.base import Index, MappedFile, MappedTensor, TensorSource
from meshwen.errors import MeshwenError

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9

_PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_SUPER_BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
_SUPPORTED = (*_PLAIN, *_BLOCKS, *_SUPER_BLOCKS)

# The package's arithmetic is fastest, by measurement, when its temporaries stay in the cache.
_ELEMENTS_AT_A_TIME = 1 << 16

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockTensor(TensorSource):
    """A quantised tensor: blocks of consecutive elements of a row, each packed into a few bytes."""

    file: MappedFile
    offset: int
    block_elements: int
    block_bytes: int
    dequantize: Callable[[np.ndarray], np.ndarray]

    def read(self, index: Index = ()) -> np.ndarray:
        """A new float32 array; only the blocks that `index` touches are read and dequantised."""
        *lead, columns = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        row_bytes = self.shape[-1] // self.block_elements * self.block_bytes
        data = self.file.bytes_at(self.offset, self.nbytes)
        rows = data.reshape(*self.shape[:-1], row_bytes)[tuple(lead)]
        wanted = range(self.shape[-1])[columns]
        out = np.empty((*rows.shape[:-1], len(wanted)), np.float32)
        if out.size:
            self._fill(out.reshape(-1, len(wanted)), rows.reshape(-1, row_bytes), wanted)
        return out

    def _fill(self, out: np.ndarray, rows: np.ndarray, wanted: range) -> None:
        first = min(wanted[0], wanted[-1]) // self.block_elements
        stop = max(wanted[0], wanted[-1]) // self.block_elements + 1
        rows = rows[:, first * self.block_bytes : stop * self.block_bytes]
        covered = (stop - first) * self.block_elements
        columns = np.arange(wanted.start, wanted.stop, wanted.step) - first * self.block_elements
        whole = len(columns) == covered and wanted.step == 1
        step = max(1, _ELEMENTS_AT_A_TIME // covered)
        for start in range(0, len(rows), step):
            packed = np.ascontiguousarray(rows[start : start + step]).reshape(1, -1)
            values = self.dequantize(packed).reshape(-1, covered)
            out[start : start + step] = values if whole else values[:, columns]


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, TensorSource], MappedFile]:
    """The metadata by key, the tensors by Hugging Face name, and the file to close.

    Metadata values are plain Python: strings, numbers, booleans, lists. A tensor whose name is not
    one of a Qwen2's keeps the name that it has in the file.

    Raises MeshwenError when the gguf package is missing, when the file is truncated, corrupt or one
    part of several, and when a tensor has a type that cannot be read.
    """
    file = MappedFile(path)
    try:
        header = _Header(file.buffer)
        metadata, infos = header.read()
    except (struct.error, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise MeshwenError(
            f"{path} is not a whole GGUF file ({error or type(error).__name__}): download it again"
        ) from None
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise MeshwenError(
            f"{path} is one of {parts} parts: join them with `llama-gguf-split --merge` first"
        )
    tensors = {}
    for info in infos:
        source = _tensor(file, info, header.data_start)
        tensors[source.name] = source
    return metadata, tensors, file


@dataclass(frozen=True)
class _TensorInfo:
    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


class _Header:
    """Reads a GGUF header from front to back."""

    def __init__(self, buffer: mmap.mmap):
        self._buffer = buffer
        self._at = 0
        self.data_start = 0

    def read(self) -> tuple[dict[str, Any], list[_TensorInfo]]:
        if self._buffer[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            # A big-endian file shows its version in the upper half.
            raise ValueError(f"version {version:#x}; versions 2 and 3, little-endian, can be read")
        tensor_count, entry_count = self._scalar("Q"), self._scalar("Q")
        metadata = {}
        for _ in range(entry_count):
            key = self._string()
            metadata[key] = self._value(self._scalar("I"))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        if len({info.name for info in infos}) < len(infos):
            raise ValueError("two tensors have the same name")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        self.data_start = -(-self._at // alignment) * alignment
        return metadata, infos

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._buffer, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        # Qwen's vocabulary has 300,000 of them: everything here is a local variable.
        buffer, at, length = self._buffer, self._at, struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(count):
            start = at + 8
            at = start + length(buffer, at)[0]
            strings.append(buffer[start:at].decode("utf-8"))
        if at > len(buffer):
            raise ValueError("it ends inside a string")
        self._at = at
        return strings

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        item_kind, count = self._scalar("I"), self._scalar("Q")
        if item_kind == _STRING:
            return self._strings(count)
        if item_kind == _ARRAY:
            return [self._value(_ARRAY) for _ in range(count)]
        items = np.frombuffer(self._buffer, f"<{_SCALARS[item_kind]}", count, self._at)
        self._at += items.nbytes
        return items.tolist()

    def _tensor_info(self) -> _TensorInfo:
        name = self._string()
        # ggml writes the fastest dimension first.
        shape = tuple(reversed([self._scalar("Q") for _ in range(self._scalar("I"))]))
        return _TensorInfo(name, shape, self._scalar("I"), self._scalar("Q"))


def _tensor(file: MappedFile, info: _TensorInfo, data_start: int) -> TensorSource:
    constants, quants = _gguf_package()
    try:
        kind = constants.GGMLQuantizationType(info.type_id)
    except ValueError:
        kind = None
    if kind is None or kind.name not in _SUPPORTED:
        raise MeshwenError(
            f"{file.path}: {info.name} has type {kind.name if kind else info.type_id}, which is "
            f"not supported; use a file with {', '.join(_SUPPORTED)}"
        )
    block_elements, block_bytes = constants.GGML_QUANT_SIZES[kind]
    if not info.shape or info.shape[-1] % block_elements:
        raise MeshwenError(
            f"{file.path}: {info.name} has shape {list(info.shape)}, whose rows are not whole "
            f"{kind.name} blocks of {block_elements}: download it again"
        )
    place: dict[str, Any] = {
        "name": hugging_face_name(info.name),
        "shape": info.shape,
        "nbytes": math.prod(info.shape) // block_elements * block_bytes,
        "file": file,
        "offset": data_start + info.offset,
    }
    if place["offset"] + place["nbytes"] > len(file):
        raise MeshwenError(
            f"{file.path} is truncated: {info.name} would end at byte "
            f"{place['offset'] + place['nbytes']} of {len(file)}; download it again"
        )
    if kind.name in _PLAIN:
        return MappedTensor(**place, dtype=_PLAIN[kind.name])
    return BlockTensor(
        **place,
        dtype=np.dtype(np.float32),
        quantization=kind.name,
        block_elements=block_elements,
        block_bytes=block_bytes,
        dequantize=lambda packed: quants.dequantize(packed, kind),
    )


def _gguf_package() -> tuple[Any, Any]:
    try:
        from gguf import constants, quants
    except ImportError:
        raise MeshwenError(
            'reading GGUF files needs the gguf package: pip install "meshwen[gguf]"'
        ) from None
    return constants, quants


def hugging_face_name(name: str) -> str:
    """The Hugging Face name of a Qwen2 tensor of a GGUF file; any other name as it is."""
    match name.split("."):
        case [tensor, kind] if tensor in _NAMES:
            return f"{_NAMES[tensor]}.{kind}"
        case ["blk", layer, tensor, kind] if tensor in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[tensor]}.{kind}"
    return name


def config_dict(metadata: Mapping[str, Any], tensors: Mapping[str, TensorSource]) -> dict[str, Any]:
    """What a GGUF file says about the model, in the words of a Hugging Face config.json.

    Raises MeshwenError when the model is not a Qwen2, or a value is missing.
    """
    if (architecture := metadata.get("general.architecture")) != "qwen2":
        raise MeshwenError(f"its architecture is {architecture}; only qwen2 is supported")
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
    for name, key in _CONFIG_KEYS.items():
        if (value := metadata.get(key)) is not None:
            config[name] = _number(value)
        elif key in _REQUIRED_KEYS:
            raise MeshwenError(f"its metadata has no {key}: it is not a whole model")
    return config


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
_REQUIRED_KEYS = tuple(_CONFIG_KEYS.values())[:7]


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


_SAMPLING_KEYS = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


def _number(value: float) -> float:
    """The value, or for a float32 the shortest decimal that is the same float32."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
