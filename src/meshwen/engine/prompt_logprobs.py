# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a prompt's tokens, as they come chunk by chunk."""

from __future__ import annotations

import math

import numpy as np

from meshwen.engine.fetched_tokens import paired
from meshwen.engine.request import Request, TopLogprobs


class PromptLogprobs:
    """Those of one prompt, whichever chunks it is prefilled in, and however often.

    Args:
        request: asks for them.
    """

    def __init__(self, request: Request):
        self._tokens, self._top = request.prompt_tokens, request.sampling.top_logprobs
        # In one list, so that an interrupt cannot part them.
        self._found: list[tuple[float | None, TopLogprobs | None]] = [(None, None)]
        self.is_finite = True  # Each is a number.

    @classmethod
    def of(cls, request: Request) -> PromptLogprobs | None:
        """A request's; None where it does not ask for them."""
        return cls(request) if request.sampling.prompt_logprobs else None

    @property
    def is_complete(self) -> bool:
        """Whether all are known."""
        return len(self._found) == len(self._tokens)

    @property
    def logprobs(self) -> tuple[float | None, ...]:
        """Of each token so far, None for the first."""
        return tuple(logprob for logprob, _ in self._found)

    @property
    def top_logprobs(self) -> tuple[TopLogprobs | None, ...]:
        """The likeliest tokens in the place of each, where asked for; None for the first."""
        return tuple(top for _, top in self._found)

    def targets(self, start: int, count: int) -> np.ndarray:
        """The prompt's tokens that follow `count` positions from `start` on, int32; 0 behind it."""
        following = self._tokens[start + 1 : start + 1 + count]
        return np.pad(np.array(following, np.int32), (0, count - len(following)))

    def push(
        self,
        start: int,
        logprobs: np.ndarray,
        top_ids: np.ndarray | None = None,
        top_logprobs: np.ndarray | None = None,
    ) -> None:
        """Takes what a step found of `targets`; what is known, or follows the prompt, is left out.

        Args:
            start: the position of the first hidden state, none after the last known token's.
            logprobs: float32 [N], of the tokens that follow.
            top_ids: int32 [N, top or more], the likeliest in their places.
            top_logprobs: float32 [N, top or more].
        """
        known = len(self._found)
        assert start < known, "a chunk of the prompt was left out"
        for i in range(known - start - 1, min(len(logprobs), len(self._tokens) - 1 - start)):
            logprob, top = float(logprobs[i]), None
            self.is_finite &= math.isfinite(logprob)
            if self._top:
                assert top_ids is not None
                assert top_logprobs is not None
                top = paired(top_ids[i, : self._top], top_logprobs[i, : self._top])
            self._found.append((logprob, top))
