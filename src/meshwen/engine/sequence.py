# SPDX-License-Identifier: Apache-2.0
"""One request while it runs: its tokens so far, its text, and whether it has ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from math import isfinite

from meshwen.engine.constraints import TokenConstraints
from meshwen.engine.prompt_lookup import PromptLookup
from meshwen.engine.request import Completion, Event, FinishReason, Request, Timings
from meshwen.engine.sampling import NO_TOKEN
from meshwen.tokenizer.tokenizer import Tokenizer


class SequenceState:
    """One request from its submission to its last token.

    Attributes:
        number: the request's.
        request: what was asked.
        tokens: the answer so far.
        finish_reason: why it has ended; None while it has not.
        cancelled: nobody wants more of it; any thread may set this.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        limit: int,
        tokenizer: Tokenizer | None,
        eos: frozenset[int],
        on_event: Callable[[Event], None],
        constraints: TokenConstraints | None = None,
    ):
        self.number, self.request, self.limit = number, request, limit
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.cancelled = False
        self._eos, self._on_event = eos, on_event
        self.constraints = constraints
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream_decoder() if tokenizer else None
        self._text = StopText(request.sampling.stop)
        self._logprobs: list[float] = []
        self._lookup: PromptLookup | None = None
        self._submitted = self._first = time.perf_counter()
        self._began: float | None = None

    @property
    def ended(self) -> bool:
        """Whether no token of it is to come."""
        return self.cancelled or self.finish_reason is not None

    @property
    def waits(self) -> bool:
        """Whether its prompt has not begun to be read."""
        return self._began is None

    @property
    def position(self) -> int:
        """Of the newest token, which no step has read yet."""
        return len(self.request.prompt_tokens) + len(self.tokens) - 1

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and answer."""
        return (*self.request.prompt_tokens, *self.tokens)

    def begin(self) -> None:
        """Its prompt is about to be read, or read again."""
        if self._began is None:
            self._began = time.perf_counter()

    def guesses(self, count: int) -> list[int]:
        """Tokens that may follow the newest one: `count`, or none."""
        if self._lookup is None:
            self._lookup = PromptLookup(list(self.token_ids))
        return self._lookup.guesses(count)

    def judge(self, right: int) -> None:
        """Told how many of the guesses were right."""
        assert self._lookup
        self._lookup.judge(right)

    def push(self, token: int, logprob: float | None) -> None:
        """Takes the next token and tells of it; may finish."""
        if not self.tokens:
            self._first = time.perf_counter()
        if token == NO_TOKEN or not isfinite(logprob or 0):
            self._fail()
            return
        self.tokens.append(token)
        if self.constraints is not None:
            self.constraints.push(token)
        if self._lookup is not None:
            self._lookup.push(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        text = self._shown(token)
        completion = self._completion(self.finish_reason) if self.finish_reason else None
        self._on_event(Event(self.number, token, text, logprob, completion))

    def _fail(self) -> None:
        """Ends the answer, since the model does not say how it goes on."""
        place = f"token {len(self.tokens) + 1} of the answer"
        error = (
            f"the model's logits for {place} are NaN or infinite: weights are damaged or overflow "
            "(meshwen inspect --stats finds those of a file)"
        )
        if self.constraints is not None and self.constraints.nothing_left():
            error = f"the sampling parameters let nothing come as {place}"
        self.finish_reason = "error"
        text = self._rest()
        completion = self._completion(self.finish_reason, error)
        self._on_event(Event(self.number, NO_TOKEN, text, None, completion))

    def _shown(self, token: int) -> str:
        """The text that can be shown after the newest token; finds out whether it is the last."""
        shown = ""
        if self._tokenizer and self._decoder:
            shown = self._text.push(self._decoder.push(token), self._tokenizer.special_text(token))
        if self._text.stopped or token in self._eos:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.limit:
            self.finish_reason = "length"
        if self.finish_reason:
            shown += self._rest()
            if self._text.stopped:
                self.finish_reason = "stop"
        return shown

    def _rest(self) -> str:
        """The text that was held back, at the end of the answer."""
        rest = self._text.push(self._decoder.finish()) if self._decoder else ""
        return rest + self._text.finish()

    def _completion(self, finish_reason: FinishReason, error: str | None = None) -> Completion:
        assert self._began is not None
        timings = Timings(
            queue_seconds=self._began - self._submitted,
            time_to_first_token=self._first - self._submitted,
            decode_seconds=time.perf_counter() - self._first,
        )
        return Completion(
            self.request.prompt_tokens,
            tuple(self.tokens),
            self._text.shown,
            finish_reason,
            tuple(self._logprobs) if self.request.sampling.logprobs else None,
            timings,
            self.request.sampling.seed if self.request.sampling.temperature > 0 else None,
            error,
        )


class StopText:
    """Text that ends at the first stop string, and never shows a part of one.

    Special tokens are no part of the text, but stop strings are found in what is written with them.

    Attributes:
        shown: all text given out so far.
        stopped: a stop string has come; nothing after it is shown.
    """

    def __init__(self, stop: Sequence[str]):
        self.shown, self.stopped = "", False
        self._stop = tuple(stop)
        self._held: deque[tuple[str, bool]] = deque()  # Pieces, and whether each is to be shown.

    def push(self, text: str, special: str = "") -> str:
        """Adds text, then a special token as it is written; returns what can be shown now."""
        if self.stopped:
            return ""
        self._held += [piece for piece in ((text, True), (special, False)) if piece[0]]
        written = "".join(piece for piece, _ in self._held)
        found = [at for at in (written.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._show(min(found))
        return self._show(len(written) - self._possible_stop(written))

    def finish(self) -> str:
        """Returns what was held back because it might have begun a stop string."""
        return "" if self.stopped else self._show(sum(len(piece) for piece, _ in self._held))

    def _show(self, length: int) -> str:
        """Lets go of so many of the characters held; returns those of them that are text."""
        text = ""
        while length:
            piece, is_text = self._held.popleft()
            gone, rest = piece[:length], piece[length:]
            if rest:
                self._held.appendleft((rest, is_text))
            text += gone if is_text else ""
            length -= len(gone)
        self.shown += text
        return text

    def _possible_stop(self, written: str) -> int:
        """Length of the longest end of what is written that begins a stop string."""
        longest = min(len(written), max((len(s) - 1 for s in self._stop), default=0))
        for length in range(longest, 0, -1):
            if any(s.startswith(written[-length:]) for s in self._stop):
                return length
        return 0
