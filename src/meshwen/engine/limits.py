# SPDX-License-Identifier: Apache-2.0
"""How long an answer may become."""

from __future__ import annotations

from dataclasses import dataclass

from meshwen.cache.budget import KVCachePlan
from meshwen.engine.request import Request


@dataclass(frozen=True)
class SequenceLimits:
    """The limits that one model sets to every request.

    Attributes:
        plan: the KV cache's.
    """

    plan: KVCachePlan

    def answer_tokens(self, request: Request) -> int:
        """Tokens that the answer may have."""
        allowed = self.allowed_tokens(request)
        if request.sampling.max_new_tokens_asked:
            return allowed
        return min(allowed, self.plan.longest - len(request.prompt_tokens))

    def allowed_tokens(self, request: Request) -> int:
        """Tokens that the answer may have where memory suffices."""
        asked, longest = request.sampling, self.plan.max_model_len
        if asked.max_length is not None:
            longest = min(longest, asked.max_length)
        return min(asked.max_new_tokens, longest - len(request.prompt_tokens))

    def check_memory(self, request: Request) -> None:
        """Refuses a request that there is no memory for.

        Raises:
            MeshwenError: not even all of the KV cache has room for it.
        """
        answer = max(self.answer_tokens(request), 1)
        self.plan.check_fits(len(request.prompt_tokens) + answer)
