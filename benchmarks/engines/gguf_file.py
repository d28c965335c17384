# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as the GGUF file that llama.cpp and OpenVINO read."""

import json
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np

from meshwen.checkpoints import open_checkpoint
from meshwen.models.qwen2 import Qwen2Config

_FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16)}


def write_gguf(model: str, kind: str, path: Path) -> None:
    """Writes a checkpoint: matrices as `kind` (F32, BF16, Q8_0, Q4_0), vectors in float32.

    So does llama.cpp's own converter.
    """
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_file_type(_FILE_TYPES[kind])
    with open_checkpoint(model) as checkpoint:
        _add_config(writer, checkpoint.config)
        _add_tokenizer(writer, Path(model), checkpoint.config)
        layers = checkpoint.config.num_hidden_layers
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, layers)
        for name, source in checkpoint.tensors.items():
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if target is None or (
                target == "output.weight" and checkpoint.config.tie_word_embeddings
            ):
                continue
            raw = gguf.GGMLQuantizationType[kind if len(source.shape) > 1 else "F32"]
            values = np.ascontiguousarray(source.read().astype(_DTYPES.get(raw.name, np.float32)))
            if raw is gguf.GGMLQuantizationType.F32:
                writer.add_tensor(target, values)
            elif raw is gguf.GGMLQuantizationType.BF16:
                writer.add_tensor(target, values.view(np.uint8), raw_dtype=raw)
            else:
                writer.add_tensor(target, gguf.quantize(values, raw), raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _add_config(writer: gguf.GGUFWriter, config: Qwen2Config) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: Qwen2Config) -> None:
    """Token ids go in and come out, but OpenVINO loads no model without a tokenizer."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = [f"[PAD{number}]" for number in range(config.vocab_size)]
    types = [gguf.TokenType.UNUSED] * config.vocab_size
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for token in tokenizer["added_tokens"]:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.CONTROL
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    for add, number in (
        (writer.add_bos_token_id, config.bos_token_id),
        (writer.add_eos_token_id, next(iter(config.eos_token_id), None)),
        (writer.add_pad_token_id, config.bos_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(False)
