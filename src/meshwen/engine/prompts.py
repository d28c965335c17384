# SPDX-License-Identifier: Apache-2.0
"""Requests made of what users give: text, token ids or conversations, and a few parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meshwen.common.arguments import one_prompt
from meshwen.engine.generation_config import unsupported
from meshwen.engine.request import Request
from meshwen.engine.sampling_params import SamplingParams, with_fresh_seed
from meshwen.errors import MeshwenError
from meshwen.tokenizer.chat_template import check_template_kwargs
from meshwen.tokenizer.tokenizer import Tokenizer

# Text, token ids, or the messages of a conversation.
AnyPrompt = str | Iterable[int] | Sequence[Mapping[str, Any]]


class Prompts:
    """Makes requests, with the sampling defaults of a checkpoint.

    Args:
        tokenizer: None: there is none, and prompts are token ids.
        generation_config: the defaults.
        fresh_seeds: give a request without a seed one that nobody knows; else it has the seed 0.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        generation_config: Mapping[str, Any],
        *,
        fresh_seeds: bool,
    ):
        self._tokenizer, self._defaults = tokenizer, generation_config
        self._fresh_seeds = fresh_seeds
        self._warned: set[str] = set()

    def request(
        self, prompt: AnyPrompt, template_kwargs: Mapping[str, Any], sampling: Mapping[str, Any]
    ) -> Request:
        """A request.

        Args:
            prompt: what is to be continued.
            template_kwargs: further variables for the chat template of a conversation.
            sampling: fields of `SamplingParams`; what is not given has its default.

        Raises:
            MeshwenError: a value is impossible, or the prompt is not of its kind.
        """
        variables = check_template_kwargs(template_kwargs)
        params = SamplingParams.from_generation_config(self._defaults, **sampling)
        if sampling.get("seed") is None and self._fresh_seeds:
            params = with_fresh_seed(params)
        self._warn_of_unsupported(greedy=params.temperature == 0)
        given = one_prompt(prompt)
        if variables and isinstance(given, tuple | str):
            raise MeshwenError(
                "chat_template_kwargs are for conversations, and this prompt is "
                f"{'text' if isinstance(given, str) else 'token ids'}: leave them out"
            )
        return Request(self.token_ids(given, variables), params)

    def token_ids(self, prompt: AnyPrompt, variables: Mapping[str, Any]) -> tuple[int, ...]:
        """A prompt's ids; `variables` are for the chat template of a conversation."""
        given = one_prompt(prompt)
        if isinstance(given, tuple):
            return given
        if self._tokenizer is None:
            raise MeshwenError("this model has no tokenizer: give prompts as token ids")
        if isinstance(given, str):
            return tuple(self._tokenizer.encode(given))
        return tuple(self._tokenizer.encode_chat(given, **variables))

    def _warn_of_unsupported(self, *, greedy: bool) -> None:
        """Once of each thing."""
        lost = unsupported(self._defaults, greedy=greedy)
        if lost and lost not in self._warned:
            self._warned.add(lost)
            warnings.warn(f"generation_config: {lost}", stacklevel=4)
