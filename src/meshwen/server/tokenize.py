# SPDX-License-Identifier: Apache-2.0
"""`/tokenize` and `/detokenize`: a text's token ids, and the text of token ids."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from annotated_types import Ge, Len, Lt
from fastapi import APIRouter, Request

from meshwen.server.chat import prompt_of
from meshwen.server.chat_models import ChatRequest, Messages, Tools
from meshwen.server.errors import ApiError
from meshwen.server.fields import Fields, check_model
from meshwen.server.prompts import text_tokens
from meshwen.server.serving import Serving

_MOST_TOKENS = 1 << 20

router = APIRouter()


class TokenizeRequest(Fields):
    """A text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Fields):
    """Token ids."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Ge(0), Lt(1 << 31)]], Len(max_length=_MOST_TOKENS)]


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """The token ids of a text or of a conversation, however long it is."""
    serving: Serving = request.app.state.serving
    check_model(serving, body.model)
    tokens = await _tokens(serving, body)
    texts = None
    if body.return_token_strs and serving.tokenizer is not None:
        texts = [serving.tokenizer.id_to_token(one) for one in tokens]
    return {
        "count": len(tokens),
        "max_model_len": serving.max_model_len,
        "tokens": tokens,
        "token_strs": texts,
    }


async def _tokens(serving: Serving, body: TokenizeRequest) -> tuple[int, ...]:
    given = body.model_fields_set - {"model", "return_token_strs"}
    if body.messages is not None:
        if wrong := given & {"prompt", "add_special_tokens"}:
            raise ApiError(400, f"{min(wrong)} does not go with messages", param=min(wrong))
        fields = {name: getattr(body, name) for name in given}
        return await prompt_of(serving, ChatRequest(**fields), limited=False)
    if body.prompt is None:
        raise ApiError(400, "there is neither prompt nor messages: give one", param="prompt")
    if wrong := given - {"prompt", "add_special_tokens"}:
        raise ApiError(400, f"{min(wrong)} goes with messages alone", param=min(wrong))
    special = body.add_special_tokens is not False
    return await text_tokens(serving, body.prompt, add_special_tokens=special)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    """The text of token ids, special tokens as they are written."""
    serving: Serving = request.app.state.serving
    check_model(serving, body.model)
    if serving.tokenizer is None:
        raise ApiError(400, "this model has no tokenizer")
    decode = serving.tokenizer.decode
    text = await asyncio.to_thread(decode, body.tokens, skip_special_tokens=False)
    return {"prompt": text}
