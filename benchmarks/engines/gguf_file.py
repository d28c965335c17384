# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as the GGUF file that llama.cpp reads, without a tokenizer."""

from pathlib import Path

import gguf
import ml_dtypes
import numpy as np

from meshwen.checkpoints import open_checkpoint
from meshwen.models.qwen2 import Qwen2Config

_TYPES = {
    "float32": (np.dtype(np.float32), gguf.GGMLQuantizationType.F32),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), gguf.GGMLQuantizationType.BF16),
    "int8": (np.dtype(np.float32), gguf.GGMLQuantizationType.Q8_0),
}


def write_gguf(model: str, dtype: str, path: Path) -> None:
    """Writes the weights of a checkpoint: matrices in `dtype` (int8: Q8_0), vectors in float32.

    So does llama.cpp's own converter.
    """
    writer = gguf.GGUFWriter(path, "qwen2")
    with open_checkpoint(model) as checkpoint:
        _add_config(writer, checkpoint.config)
        layers = checkpoint.config.num_hidden_layers
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, layers)
        for name, source in checkpoint.tensors.items():
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if target is None or (
                target == "output.weight" and checkpoint.config.tie_word_embeddings
            ):
                continue
            kind, raw = _TYPES[dtype if len(source.shape) > 1 else "float32"]
            values = np.ascontiguousarray(source.read().astype(kind))
            if raw is gguf.GGMLQuantizationType.F32:
                writer.add_tensor(target, values)
            elif raw is gguf.GGMLQuantizationType.Q8_0:
                writer.add_tensor(target, gguf.quantize(values, raw), raw_dtype=raw)
            else:
                writer.add_tensor(target, values.view(np.uint8), raw_dtype=raw)
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
    writer.add_tokenizer_model("no_vocab")  # Token ids go in and come out.
