# SPDX-License-Identifier: Apache-2.0
"""What GGUF files call the tensors of each architecture; the suffixes are the same."""

_MODEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
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
# Of a layer's modules, by `general.architecture`, which is the `model_type` of a config.json too.
LAYER_NAMES = {
    "qwen2": _LAYER,
    "qwen3": _LAYER | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
}


def hugging_face_name(name: str, architecture: str) -> str:
    """The Hugging Face name of a tensor of a GGUF file.

    A name that is none of the architecture's, and every name of an architecture that is not known,
    stays as it is.
    """
    layer_names = LAYER_NAMES.get(architecture, {})
    match name.split("."):
        case [tensor, kind] if tensor in _MODEL:
            return f"{_MODEL[tensor]}.{kind}"
        case ["blk", layer, tensor, kind] if tensor in layer_names:
            return f"model.layers.{layer}.{layer_names[tensor]}.{kind}"
    return name
