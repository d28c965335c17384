# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities in the shape of OpenAI's completions: lists of texts, values and offsets."""

from __future__ import annotations

from typing import Any

from meshwen.engine.request import Completion, Event, TopLogprobs
from meshwen.server.token_texts import TokenTexts
from meshwen.tokenizer.tokenizer import Tokenizer


class TextLogprobs:
    """Those of one answer, as its tokens come.

    Args:
        tokenizer: the model's; None: it has none, and all offsets are 0.
        texts: writes tokens.
        count: how many of the likeliest tokens each has.
    """

    def __init__(self, tokenizer: Tokenizer | None, texts: TokenTexts, count: int):
        self._texts, self._count = texts, count
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream_decoder() if tokenizer else None
        self._length = 0  # Of the text so far: where the next token begins.
        self._lists = _empty()

    def add(self, event: Event) -> None:
        """Adds an answer's next token."""
        assert event.logprob is not None
        self._add(event.token, event.logprob, event.top_logprobs, special=False)

    def put_prompt(self, completion: Completion) -> None:
        """Puts the prompt's tokens before those of the answer so far, which begin where it ends."""
        prompt = TextLogprobs(self._tokenizer, self._texts, self._count)
        logprobs = completion.prompt_logprobs or ()
        tops = completion.prompt_top_logprobs or (None,) * len(logprobs)
        for token, logprob, top in zip(completion.prompt_tokens, logprobs, tops, strict=True):
            prompt._add(token, logprob, top, special=True)
        own = self._lists
        own["text_offset"] = [prompt._length + offset for offset in own["text_offset"]]
        self._lists = {name: prompt._lists[name] + own[name] for name in own}

    def take(self) -> dict[str, list[Any]]:
        """What was added since this was last called."""
        taken, self._lists = self._lists, _empty()
        return taken

    def _add(
        self, token: int, logprob: float | None, top: TopLogprobs | None, special: bool
    ) -> None:
        """Adds a token; of the first of a prompt nothing is known."""
        found = self._lists
        found["tokens"].append(self._texts.text(token, "bytes:"))
        found["token_logprobs"].append(logprob)
        found["top_logprobs"].append(
            None
            if logprob is None
            else self._texts.top_by_text(token, logprob, (top or ())[: self._count])
        )
        found["text_offset"].append(self._length)
        if self._tokenizer is not None and self._decoder is not None:
            self._length += len(self._decoder.push(token))
            self._length += len(self._tokenizer.special_text(token)) if special else 0


def _empty() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
