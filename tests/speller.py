# SPDX-License-Identifier: Apache-2.0
"""A checkpoint whose greedy answer is known without running it: it spells `ANSWER`, then ends.

Attention and MLP add nothing (their output projections are zero), so the next token depends on the
last one alone: the head's row of each letter is the embedding of the letter before it. The text's
bytes all differ, and the emoji takes four tokens.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from meshwen.causal_lm import Qwen2ForCausalLM
from meshwen.checkpoints import Checkpoint
from meshwen.cli.load import load_model
from meshwen.engine.options import EngineOptions
from meshwen.tokenizer.tokenizer import byte_alphabet

ANSWER = "Hi \N{CHRISTMAS TREE}!"
CONTEXT = 160
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 64, 48, 6, 2, 8
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% endif %}"
)


def token_ids(text: str) -> list[int]:
    """A text's ids, worked out without the tokenizer: a byte is its own rank in the alphabet."""
    ranks = {byte: rank for rank, byte in enumerate(byte_alphabet().values())}
    return [ranks[byte] for byte in text.encode()]


def chat_ids(*messages: tuple[str, str]) -> list[int]:
    """The ids of a conversation whose answer is wanted."""
    start, end = 257, 258
    ids = []
    for role, content in messages:
        ids += [start, *token_ids(f"{role}\n{content}"), end, *token_ids("\n")]
    return [*ids, start, *token_ids("assistant\n")]


def answer_ids() -> list[int]:
    """The ids of the whole answer, the end of the turn included."""
    return [*token_ids(ANSWER), 258]


def answer_logprobs() -> np.ndarray:
    """The log-probability of each of the answer's tokens: float64, from the weights' definition."""
    weights = {k: v.astype(np.float64) for k, v in _weights(256 + len(SPECIAL)).items()}
    read = [token_ids("\n")[0], *answer_ids()[:-1]]
    x = weights["model.embed_tokens.weight"][read]
    logits = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) @ weights["lm_head.weight"].T
    logits -= logits.max(axis=1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return np.log(probabilities[np.arange(len(read)), answer_ids()])


def write_speller(folder: Path) -> Path:
    """Writes the checkpoint as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "vocab_size": 256 + len(SPECIAL),
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": 258,
    }
    _write_json(folder / "config.json", config)
    save_file(_weights(config["vocab_size"]), folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


def load_once() -> Callable[..., Qwen2ForCausalLM]:
    """The command line's `load_model`, keeping models: what one test compiles serves the next."""
    models = {}

    def load(checkpoint: Checkpoint, tokenizer: object, options: EngineOptions) -> Qwen2ForCausalLM:
        key = (checkpoint.path, checkpoint.format, options)
        if key not in models:
            models[key] = load_model(checkpoint, tokenizer, options)
        return models[key]

    return load


def _weights(vocab: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((vocab, HIDDEN)).astype(np.float32)
    head = np.zeros_like(embedding)
    before = token_ids("\n")[0]
    for token in answer_ids():
        head[token] = embedding[before] / 16  # Likely, but not certain: see `answer_logprobs`.
        before = token
    query, key = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {
        "self_attn.q_proj.weight": (query, HIDDEN),
        "self_attn.q_proj.bias": (query,),
        "self_attn.k_proj.weight": (key, HIDDEN),
        "self_attn.k_proj.bias": (key,),
        "self_attn.v_proj.weight": (key, HIDDEN),
        "self_attn.v_proj.bias": (key,),
        "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
    }
    zero = {
        "self_attn.o_proj.weight": (HIDDEN, query),
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    }
    weights = {"model.embed_tokens.weight": embedding}
    for layer in ("model.layers.0.", "model.layers.1."):
        for name, shape in shapes.items():
            weights[layer + name] = rng.standard_normal(shape).astype(np.float32)
        for name, shape in zero.items():
            weights[layer + name] = np.zeros(shape, np.float32)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}{norm}.weight"] = np.ones(HIDDEN, np.float32)
    weights["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    weights["lm_head.weight"] = head
    return weights


def write_tokenizer(folder: Path) -> None:
    """The tokenizer's files: a token for each byte, and a chat template."""
    backend = Tokenizer(BPE({char: i for i, char in enumerate(byte_alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json", {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
