# SPDX-License-Identifier: Apache-2.0
"""What a step sampled, on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from jax import Array

from meshwen.engine.request import TopLogprobs
from meshwen.engine.sampling import Sampled
from meshwen.parallel.distributed import to_host


@dataclass(frozen=True)
class FetchedTokens:
    """The tokens of each row of a step; see `meshwen.engine.sampling.Sampled`.

    Attributes:
        tokens: int32 [B, T].
        logprobs: float32 [B, T], or None.
        top_ids: int32 [B, T, top], or None.
        top_logprobs: float32 [B, T, top], or None.
    """

    tokens: np.ndarray
    logprobs: np.ndarray | None
    top_ids: np.ndarray | None
    top_logprobs: np.ndarray | None

    @classmethod
    def of(cls, sampled: Sampled) -> Self:
        """Waits for a step; every process has to."""
        rows = len(sampled.tokens)

        def fetched(array: Array | None, *last: int) -> np.ndarray | None:
            return None if array is None else to_host(array).reshape(rows, -1, *last)

        tokens, top = fetched(sampled.tokens), sampled.top_ids
        assert tokens is not None
        width = () if top is None else top.shape[-1:]
        return cls(
            tokens,
            fetched(sampled.logprobs),
            fetched(top, *width),
            fetched(sampled.top_logprobs, *width),
        )

    def at(self, row: int, place: int) -> tuple[int, float | None, TopLogprobs | None]:
        """A token, its log-probability, and the likeliest tokens in its place."""
        token = int(self.tokens[row, place])
        logprob = None if self.logprobs is None else float(self.logprobs[row, place])
        if self.top_ids is None or self.top_logprobs is None:
            return token, logprob, None
        return token, logprob, paired(self.top_ids[row, place], self.top_logprobs[row, place])


def paired(ids: np.ndarray, logprobs: np.ndarray) -> TopLogprobs:
    """Token ids, int [top], with their log-probabilities, float [top]."""
    return tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))
