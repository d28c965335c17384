# SPDX-License-Identifier: Apache-2.0
"""The prompt style for who names none: few-shot for base models, a conversation for the others."""

from __future__ import annotations

from meshwen.checkpoints import Checkpoint
from meshwen.errors import MeshwenError
from meshwen.tokenizer.tokenizer import Tokenizer

_BASE, _INSTRUCT = "lm-eval", "qwen-boxed"
_ANSWER = "an answer"


def default_style(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> tuple[str, str]:
    """A style's name, and why it is this one.

    A model is taken for a base model where it has no chat template, or does not end texts with what
    ends a turn of it: Qwen2.5's base models have the template too, but end with `<|endoftext|>`
    alone.
    """
    if tokenizer is None:
        return _INSTRUCT, "the default"
    if not tokenizer.has_chat_template:
        return _BASE, "the model has no chat template, so it is taken for a base model"
    end = _end_of_turn(tokenizer)
    if end is None or end in _ends(checkpoint, tokenizer):
        return _INSTRUCT, "the model has a chat template, and ends texts as turns of it end"
    return _BASE, (
        f"{tokenizer.id_to_token(end)} ends a turn of the model's chat template, but is none of "
        "its end tokens, so it is taken for a base model"
    )


def _end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template puts after an answer; None where there is none."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    except MeshwenError:  # To be told when problems are put into it.
        return None
    _, found, after = text.rpartition(_ANSWER)
    ids = tokenizer.encode(after.lstrip(), add_special_tokens=False) if found else []
    return ids[0] if ids and tokenizer.special_text(ids[0]) else None


def _ends(checkpoint: Checkpoint, tokenizer: Tokenizer) -> set[int]:
    """All tokens that any of the checkpoint's files names as an end."""
    given = checkpoint.generation_config.get("eos_token_id")
    named = [given] if isinstance(given, int) else list(given or ())
    return {*named, *checkpoint.config.eos_token_id, *tokenizer.eos_token_ids}
