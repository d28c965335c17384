# SPDX-License-Identifier: Apache-2.0
"""Tokens and their log-probabilities as OpenAI's and vLLM's responses write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meshwen.engine.request import Completion, TopLogprobs
from meshwen.tokenizer.tokenizer import Tokenizer

_LEAST = -9999.0  # JSON has no minus infinity.


class TokenTexts:
    """Writes tokens.

    Args:
        tokenizer: the model's; None: it has none.
        as_ids: write each token as "token_id:5".
    """

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool | None = False):
        self._tokenizer, self._as_ids = tokenizer, as_ids or tokenizer is None

    def text(self, token: int, prefix: str = "") -> str:
        r"""A token as text; where it is a part of a character, its bytes as `\xf0\x9f`.

        Args:
            token: its id.
            prefix: what goes before such bytes.
        """
        if self._as_ids or self._tokenizer is None:
            return f"token_id:{token}"
        data = self._tokenizer.token_bytes(token)
        try:
            return self._tokenizer.special_text(token) or data.decode()
        except UnicodeDecodeError:
            return prefix + "".join(f"\\x{byte:02x}" for byte in data)

    def data(self, token: int) -> list[int]:
        """The bytes that a token adds to the text: none for a special token."""
        return [] if self._tokenizer is None else list(self._tokenizer.token_bytes(token))

    def chat_logprobs(
        self, tokens: Sequence[tuple[int, float, TopLogprobs]]
    ) -> list[dict[str, Any]]:
        """Log-probabilities in the shape of chat completions.

        Args:
            tokens: each with its log-probability, and the likeliest in its place.
        """
        return [
            self._entry(token, logprob) | {"top_logprobs": [self._entry(*one) for one in top]}
            for token, logprob, top in tokens
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.text(token),
            "logprob": _finite(logprob),
            "bytes": self.data(token),
        }

    def top_by_text(self, token: int, logprob: float, top: TopLogprobs) -> dict[str, float]:
        """The likeliest tokens and the token itself, by text: the shape of completions.

        Where several have one text, it stands for the likeliest.
        """
        found: dict[str, float] = {}
        for one, value in (*top, (token, logprob)):
            found.setdefault(self.text(one, "bytes:"), _finite(value))
        return found

    def prompt_logprobs(
        self, completion: Completion, count: int
    ) -> list[dict[str, dict[str, Any]] | None]:
        """Log-probabilities of a prompt in vLLM's shape: by token id, the prompt's own first.

        The rank of a token that is not among the likeliest is not known, and null.

        Args:
            completion: has them.
            count: how many of the likeliest to give.
        """
        found: list[dict[str, dict[str, Any]] | None] = []
        logprobs = completion.prompt_logprobs or ()
        tops = completion.prompt_top_logprobs or (None,) * len(logprobs)
        for token, logprob, top in zip(completion.prompt_tokens, logprobs, tops, strict=True):
            if logprob is None:
                found.append(None)
                continue
            likeliest = (top or ())[:count]
            ranks = {one: rank for rank, (one, _) in enumerate(likeliest, start=1)}
            pairs = dict([(token, logprob), *likeliest])
            found.append(
                {
                    str(one): {
                        "logprob": _finite(value),
                        "rank": ranks.get(one),
                        "decoded_token": self.text(one),
                    }
                    for one, value in pairs.items()
                }
            )
        return found


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
