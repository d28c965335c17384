# SPDX-License-Identifier: Apache-2.0
"""From sampled tokens to events: each goes into its sequence, then to who asked for it."""

from __future__ import annotations

from math import isfinite

from meshwen.engine.request import Completion, Event, FinishReason
from meshwen.engine.sampling import NO_TOKEN
from meshwen.engine.sequence import SequenceState


class Delivery:
    """Delivers tokens, so that an error of one request's delivery reaches no other request.

    It may come of the text or the constraints that a token goes into, or of `on_event`.

    Attributes:
        delivering: the request whose token is being delivered, so whose `on_event` may be running;
            None between those. An interrupt leaves it set.
    """

    def __init__(self) -> None:
        self.delivering: int | None = None
        self._errors: list[tuple[int, Exception]] = []

    def clear(self) -> None:
        """Forgets what was being delivered, and errors that nobody has taken."""
        self.delivering, self._errors = None, []

    def deliver(self, sequence: SequenceState, token: int, logprob: float | None) -> None:
        """Gives a sequence its next token; an error cancels it."""
        if not sequence.request.sampling.logprobs:
            logprob = None
        self.delivering = sequence.number
        try:
            sequence.on_event(_next_event(sequence, token, logprob))
        except Exception as error:
            self._errors.append((sequence.number, error))
            sequence.cancelled = True
        self.delivering = None

    def take_errors(self) -> list[tuple[int, Exception]]:
        """What deliveries raised since this was last called, each with its request's number."""
        errors, self._errors = self._errors, []
        return errors


def _next_event(sequence: SequenceState, token: int, logprob: float | None) -> Event:
    """Adds a token to a sequence, which may end with it."""
    if not sequence.tokens:
        sequence.timer.first_token()
    if token == NO_TOKEN or not isfinite(logprob or 0):
        return _error_event(sequence)
    sequence.append(token, logprob)
    shown = sequence.text.push(token)
    sequence.finish_reason = _finish_reason(sequence)
    if sequence.finish_reason:
        shown += sequence.text.finish()
        if sequence.text.stopped:
            sequence.finish_reason = "stop"
    completion = _completion(sequence, sequence.finish_reason) if sequence.finish_reason else None
    return Event(sequence.number, token, shown, logprob, completion)


def _finish_reason(sequence: SequenceState) -> FinishReason | None:
    """Why an answer ends with its newest token; None: it goes on."""
    if sequence.text.stopped or sequence.tokens[-1] in sequence.eos_token_ids:
        return "stop"
    return "length" if len(sequence.tokens) == sequence.limit else None


def _error_event(sequence: SequenceState) -> Event:
    """Ends an answer for which the model gave no next token."""
    place = f"token {len(sequence.tokens) + 1} of the answer"
    error = (
        f"the model's logits for {place} are NaN or infinite: weights are damaged or overflow "
        "(meshwen inspect --stats finds those of a file)"
    )
    if sequence.constraints is not None and sequence.constraints.nothing_left():
        error = f"the sampling parameters let nothing come as {place}"
    sequence.finish_reason = "error"
    rest = sequence.text.finish()
    completion = _completion(sequence, sequence.finish_reason, error)
    return Event(sequence.number, NO_TOKEN, rest, None, completion)


def _completion(
    sequence: SequenceState, finish_reason: FinishReason, error: str | None = None
) -> Completion:
    """The whole answer of a sequence that ends now."""
    sampling = sequence.request.sampling
    return Completion(
        sequence.request.prompt_tokens,
        tuple(sequence.tokens),
        sequence.text.shown,
        finish_reason,
        tuple(sequence.logprobs) if sampling.logprobs else None,
        sequence.timer.timings(),
        sampling.seed if sampling.temperature > 0 else None,
        error,
    )
