# SPDX-License-Identifier: Apache-2.0
"""One request while it runs: its tokens so far, and whether it has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from meshwen.engine.answer_text import AnswerText
from meshwen.engine.constraints import AnswerConstraints
from meshwen.engine.prompt_logprobs import PromptLogprobs
from meshwen.engine.request import Event, FinishReason, Request, TopLogprobs
from meshwen.engine.timing import RequestTimer


@dataclass(eq=False)
class SequenceState:
    """One answer of a request, from its submission to its last token.

    Attributes:
        number: its own.
        request: what was asked; the seed is that of this answer.
        limit: the most tokens of the answer.
        eos_token_ids: end-of-text tokens that end the answer.
        on_event: called with each token.
        text: the answer's.
        constraints: on its tokens; None where every token may come.
        token_ids: prompt and answer so far.
        tokens: the answer so far.
        logprobs: of these, where they were asked for.
        top_logprobs: the likeliest tokens in their places, where they were asked for.
        prompt_logprobs: those of the prompt; None where they were not asked for.
        finish_reason: why it has ended; None while it has not.
        cancelled: nobody wants more of it; any thread may set this.
        timer: when it was submitted, began and had its first token.
        computed: of its first tokens those that are in the cache, or will be after this step.
        cached_tokens: of the prompt's those that were in the cache when it began.
        choice: which of the request's answers this is, from 0 on.
        siblings: answers that begin when this one has its prompt in the cache.
        digests: of its first full blocks, as far as prefixes were looked for.
    """

    number: int
    request: Request
    limit: int
    eos_token_ids: frozenset[int]
    on_event: Callable[[Event], None]
    text: AnswerText
    constraints: AnswerConstraints | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cancelled: bool = False
    timer: RequestTimer = field(default_factory=RequestTimer)
    computed: int = 0
    cached_tokens: int = 0
    choice: int = 0
    siblings: list[SequenceState] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = field(init=False)

    def __post_init__(self) -> None:
        """Begins with the prompt, and with what the request asks for."""
        self.token_ids: list[int] = [*self.request.prompt_tokens, *self.tokens]
        self.prompt_logprobs = PromptLogprobs.of(self.request)

    @property
    def request_number(self) -> int:
        """That of its request: the first of its answers has it, too."""
        return self.number - self.choice

    @property
    def ended(self) -> bool:
        """Whether no token of it is to come."""
        return self.cancelled or self.finish_reason is not None

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.token_ids)

    def begin(self, cached: int) -> None:
        """It has a row, and blocks in which its first tokens are cached."""
        if self.timer.waits:
            self.cached_tokens = cached
        self.timer.begin()
        self.computed = cached

    def append(self, token: int, logprob: float | None, top: TopLogprobs | None = None) -> None:
        """Takes the next token, and log-probabilities where they were asked for."""
        self.tokens.append(token)
        self.token_ids.append(token)
        if self.constraints is not None:
            self.constraints.push(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if top is not None:
            self.top_logprobs.append(top)
