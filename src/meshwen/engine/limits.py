# SPDX-License-Identifier: Apache-2.0
"""How long an answer may become, and how many positions of the cache a sequence needs."""

from __future__ import annotations

from dataclasses import dataclass

from meshwen.cache.budget import CacheBudget
from meshwen.engine.request import Request
from meshwen.engine.sequence import SequenceState
from meshwen.runtime.shape_buckets import chunks, shape_bucket

# Tokens of an answer that the cache has room for before they come; for more it grows with them.
_AHEAD = 256


@dataclass(frozen=True)
class SequenceLimits:
    """The limits that one model sets to every request.

    Attributes:
        budget: of the cache.
        score_heads: query heads of a device whose scores attention writes to memory, padding
            included; they bound the chunks of a prompt.
    """

    budget: CacheBudget
    score_heads: int

    def answer_tokens(self, request: Request) -> int:
        """Tokens that the answer may have."""
        allowed = self.allowed_tokens(request)
        if request.sampling.max_new_tokens_asked:
            return allowed
        return min(allowed, self.budget.longest - len(request.prompt_tokens))

    def allowed_tokens(self, request: Request) -> int:
        """Tokens that the answer may have where memory suffices."""
        asked, longest = request.sampling, self.budget.max_model_len
        if asked.max_length is not None:
            longest = min(longest, asked.max_length)
        return min(asked.max_new_tokens, longest - len(request.prompt_tokens))

    def check_memory(self, request: Request) -> None:
        """Refuses a request that there is no memory for.

        Raises:
            MeshwenError: the cache would be too long for even one sequence.
        """
        answer = max(self.answer_tokens(request), 1)
        self.budget.rows(1, shape_bucket(self._positions(len(request.prompt_tokens), answer)))

    def chunks(self, length: int) -> list[int]:
        """Chunks that a prompt of `length` tokens is prefilled in."""
        return chunks(length, self.score_heads)

    def positions_to_begin(self, sequence: SequenceState) -> int:
        """Positions of the cache that a sequence needs before its prefill can begin."""
        answer = min(sequence.limit - len(sequence.tokens), _AHEAD)
        return self._positions(sequence.length, answer)

    def _positions(self, prompt: int, answer: int) -> int:
        # Chunks are written whole, also where the last is longer than what is left of the prompt.
        return max(sum(self.chunks(prompt)), prompt + answer)
