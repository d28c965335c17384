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
    """The tokens that a step sampled; see `meshwen.engine.sampling.Sampled`.

    Attributes:
        tokens: int32 [B].
        logprobs: float32 [B], or None.
        top_ids: int32 [B, top], or None.
        top_logprobs: float32 [B, top], or None.
    """

    tokens: np.ndarray
    logprobs: np.ndarray | None
    top_ids: np.ndarray | None
    top_logprobs: np.ndarray | None

    @classmethod
    def of(cls, sampled: Sampled) -> Self:
        """Waits for a step; every process has to."""

        def fetched(array: Array | None) -> np.ndarray | None:
            return None if array is None else to_host(array)

        tokens = to_host(sampled.tokens)
        return cls(
            tokens,
            fetched(sampled.logprobs),
            fetched(sampled.top_ids),
            fetched(sampled.top_logprobs),
        )

    def at(self, place: int) -> tuple[int, float | None, TopLogprobs | None]:
        """A token, its log-probability, and the likeliest tokens in its place."""
        token = int(self.tokens[place])
        logprob = None if self.logprobs is None else float(self.logprobs[place])
        if self.top_ids is None or self.top_logprobs is None:
            return token, logprob, None
        return token, logprob, paired(self.top_ids[place], self.top_logprobs[place])


def paired(ids: np.ndarray, logprobs: np.ndarray) -> TopLogprobs:
    """Token ids, int [top], with their log-probabilities, float [top]."""
    return tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))
