# SPDX-License-Identifier: Apache-2.0
"""The demo checkpoint's tokenizer and chat format: Qwen2.5's, with a small vocabulary."""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers

from meshwen.tokenizer.tokenizer import Tokenizer

SYSTEM_PROMPT = "You solve word problems."
ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SYSTEM_TURN = f"{IM_START}system\n{SYSTEM_PROMPT}{IM_END}\n"
# Qwen2.5's ChatML, without tools.
CHAT_TEMPLATE = (
    "{%- if tools %}{{- raise_exception('the demo model knows no tools') }}{%- endif %}"
    "{%- if messages[0].role != 'system' %}"
    "{{- '<|im_start|>system\\n" + SYSTEM_PROMPT + "<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Qwen2's pre-tokenizer, but for numbers: Qwen2 has a token a digit. With a token a number, a model
# of this size learns in minutes to copy numbers and to add them; with digits it hardly begins to.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(texts: Iterable[str], vocabulary: int, out: Path) -> Tokenizer:
    """Trains a byte-level BPE; writes tokenizer.json and tokenizer_config.json; returns it."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = [ENDOFTEXT, IM_START, IM_END]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary - len(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in special]
    )
    if backend.get_vocab_size() != vocabulary:
        raise SystemExit(f"the tokenizer has {backend.get_vocab_size()} tokens, not {vocabulary}")
    backend.save(str(out / "tokenizer.json"))
    config = {
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": 1024,
        "pad_token": ENDOFTEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(out / "tokenizer_config.json", config)
    return Tokenizer.from_folder(out)


def turn(question: str) -> str:
    return f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n"


def check_turns(tokenizer: Tokenizer) -> None:
    """Holds `turn` against the chat template, which is too slow for every row."""
    chat = [("user", "Why?"), ("assistant", "So."), ("user", "And?")]
    expected = tokenizer.apply_chat_template([{"role": r, "content": text} for r, text in chat])
    if SYSTEM_TURN + turn("Why?") + f"So.{IM_END}\n" + turn("And?") != expected:
        raise SystemExit(f"the chat template gives {expected!r}")


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
