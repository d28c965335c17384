# SPDX-License-Identifier: Apache-2.0
"""The published sizes of Qwen2.5, by name: configs without weights."""

from meshwen.errors import MeshwenError
from meshwen.models.config import ModelConfig
from meshwen.models.registry import architecture

# hidden, intermediate, layers, query heads, kv heads, vocabulary, tied embeddings of the Instruct
# models. The base models differ in two fields: rms_norm_eps is 1e-5 from 14B up, and
# max_position_embeddings is 131072 for 1.5B and from 7B up.
_PUBLISHED = {
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-3b": (2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),
    "qwen2.5-14b": (5120, 13824, 48, 40, 8, 152064, False),
    "qwen2.5-32b": (5120, 27648, 64, 40, 8, 152064, False),
    "qwen2.5-72b": (8192, 29568, 80, 64, 8, 152064, False),
}

PRESETS = tuple(_PUBLISHED)


def preset(name: str) -> ModelConfig:
    """Return the config of a published Qwen2.5 Instruct size, e.g. ``qwen2.5-7b`` (any case).

    Raises MeshwenError, which lists the names, when there is no such preset.
    """
    key = name.lower()
    if key not in _PUBLISHED:
        raise MeshwenError(f"no preset named {name!r}; presets: {', '.join(PRESETS)}")
    hidden, intermediate, layers, heads, kv_heads, vocab, tied = _PUBLISHED[key]
    return architecture("qwen2").CONFIG(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=tied,
        bos_token_id=151643,
        eos_token_id=(151645,),
        torch_dtype="bfloat16",
        name=key,
    )
