# SPDX-License-Identifier: Apache-2.0
"""Prompts as token ids: made by worker threads, and not longer than the model's context."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from meshwen.errors import MeshwenError
from meshwen.server.errors import ApiError
from meshwen.server.serving import Serving
from meshwen.tokenizer.tokenizer import Tokenizer


async def chat_prompt(
    serving: Serving,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    param: str = "messages",
    limited: bool = True,
    **variables: Any,
) -> tuple[int, ...]:
    """A conversation's token ids, by the checkpoint's chat template.

    Args:
        serving: the model.
        messages: as the template takes them.
        tools: those that may be called.
        add_generation_prompt: end with the opening of the assistant's turn.
        param: the request's field that has the messages, for errors.
        limited: whether there must be room for an answer.
        variables: `continue_final_message`, `documents`, and further variables of the template.

    Raises:
        ApiError: 400: the template refuses it, or it is too long.
    """
    encode = partial(
        _tokenizer(serving).encode_chat, messages, tools, add_generation_prompt, **variables
    )
    ids = await _encoded(encode, param)
    if limited:
        check_length(serving, len(ids), param, "messages")
    return ids


async def text_prompt(
    serving: Serving, text: str, *, add_special_tokens: bool = True, param: str = "prompt"
) -> tuple[int, ...]:
    """A text's token ids, with room for an answer.

    Raises:
        ApiError: 400: it is too long, or the model has no tokenizer.
    """
    ids = await text_tokens(serving, text, add_special_tokens=add_special_tokens, param=param)
    check_length(serving, len(ids), param)
    return ids


async def text_tokens(
    serving: Serving, text: str, *, add_special_tokens: bool = True, param: str = "prompt"
) -> tuple[int, ...]:
    """A text's token ids, however many they are.

    Raises:
        ApiError: 400: the tokenizer refuses it, or the model has none.
    """
    encode = partial(_tokenizer(serving).encode, text, add_special_tokens=add_special_tokens)
    return await _encoded(encode, param)


def check_length(serving: Serving, length: int, param: str, what: str = "prompt") -> None:
    """Refuses a prompt that leaves no room for an answer, in the words that clients look for.

    Args:
        serving: the model.
        length: of the prompt, in tokens.
        param: the request's field that has it.
        what: what it is called there.

    Raises:
        ApiError: 400, `context_length_exceeded`.
    """
    if length >= serving.max_model_len:
        raise ApiError(
            400,
            f"This model's maximum context length is {serving.max_model_len} tokens. However, your "
            f"{what} resulted in {length} tokens, which leaves none for the answer. Please reduce "
            f"the length of the {what}.",
            param=param,
            code="context_length_exceeded",
        )


def _tokenizer(serving: Serving) -> Tokenizer:
    if serving.tokenizer is None:
        raise ApiError(400, "this model has no tokenizer: give token ids to /v1/completions")
    return serving.tokenizer


async def _encoded(encode: Callable[[], list[int]], param: str) -> tuple[int, ...]:
    try:
        return tuple(await asyncio.to_thread(encode))
    except MeshwenError as error:
        raise ApiError(400, str(error), param=param) from None
