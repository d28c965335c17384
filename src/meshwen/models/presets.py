# SPDX-License-Identifier: Apache-2.0
"""Published sizes, by name: configs without weights."""

from typing import Any

from meshwen.errors import MeshwenError
from meshwen.models.config import ModelConfig
from meshwen.models.registry import architecture

# hidden, intermediate, layers, query heads, kv heads, vocabulary, tied embeddings.
_Sizes = tuple[int, int, int, int, int, int, bool]
# Of the Instruct models. The base models differ in two fields: rms_norm_eps is 1e-5 from 14B up,
# and max_position_embeddings is 131072 for 1.5B and from 7B up.
_QWEN2_5: dict[str, _Sizes] = {
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-3b": (2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),
    "qwen2.5-14b": (5120, 13824, 48, 40, 8, 152064, False),
    "qwen2.5-32b": (5120, 27648, 64, 40, 8, 152064, False),
    "qwen2.5-72b": (8192, 29568, 80, 64, 8, 152064, False),
}
# Of the models that think and answer. The base models' max_position_embeddings is 32768.
_QWEN3: dict[str, _Sizes] = {
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 151936, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 151936, True),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 151936, True),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 151936, False),
    "qwen3-14b": (5120, 17408, 40, 40, 8, 151936, False),
    "qwen3-32b": (5120, 25600, 64, 64, 8, 151936, False),
}
_SHARED: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "bos_token_id": 151643,
    "eos_token_id": (151645,),
    "torch_dtype": "bfloat16",
}
# By architecture: the sizes, and what all of them share.
_PUBLISHED: dict[str, tuple[dict[str, _Sizes], dict[str, Any]]] = {
    "qwen2": (_QWEN2_5, _SHARED | {"max_position_embeddings": 32768}),
    "qwen3": (_QWEN3, _SHARED | {"max_position_embeddings": 40960, "head_dim": 128}),
}

PRESETS = tuple(name for sizes, _ in _PUBLISHED.values() for name in sizes)


def preset(name: str) -> ModelConfig:
    """Return the config of a published size, e.g. ``qwen2.5-7b`` or ``qwen3-8b`` (any case).

    Raises MeshwenError, which lists the names, when there is no such preset.
    """
    key = name.lower()
    for model_type, (sizes, shared) in _PUBLISHED.items():
        if key in sizes:
            hidden, intermediate, layers, heads, kv_heads, vocab, tied = sizes[key]
            return architecture(model_type).CONFIG(
                vocab_size=vocab,
                hidden_size=hidden,
                intermediate_size=intermediate,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                tie_word_embeddings=tied,
                name=key,
                **shared,
            )
    raise MeshwenError(f"no preset named {name!r}; presets: {', '.join(PRESETS)}")
