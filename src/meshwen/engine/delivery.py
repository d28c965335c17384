# SPDX-License-Identifier: Apache-2.0
"""From sampled tokens to events: each goes into its sequence, then to who asked for it."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

from meshwen.engine.request import Completion, Event, FinishReason, TopLogprobs
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

    def deliver(
        self,
        sequence: SequenceState,
        token: int,
        logprob: float | None,
        top: TopLogprobs | None = None,
    ) -> None:
        """Gives a sequence its next token; an error cancels it.

        Nothing is given to another answer of a request that has failed: one error ends all of it.

        Args:
            sequence: the sequence.
            token: the token.
            logprob: its log-probability, if the step gives any; those who asked get it.
            top: likeliest tokens in its place, as many as the sequence asked for or more.
        """
        if any(number == sequence.request_number for number, _ in self._errors):
            sequence.cancelled = True
            return
        asked = sequence.request.sampling
        if not asked.logprobs:
            logprob = top = None
        elif top is not None:
            top = top[: asked.top_logprobs] if asked.top_logprobs else None
        self.delivering = sequence.request_number
        try:
            sequence.on_event(_next_event(sequence, token, logprob, top))
        except Exception as error:
            self._errors.append((sequence.request_number, error))
            sequence.cancelled = True
        self.delivering = None

    def take_errors(self) -> list[tuple[int, Exception]]:
        """What deliveries raised since this was last called, each with its request's number."""
        errors, self._errors = self._errors, []
        return errors


def _next_event(
    sequence: SequenceState, token: int, logprob: float | None, top: TopLogprobs | None
) -> Event:
    """Adds a token to a sequence, which may end with it."""
    if not sequence.tokens:
        sequence.timer.first_token()
    if token == NO_TOKEN or not isfinite(logprob or 0) or _prompt_is_broken(sequence):
        return _error_event(sequence)
    sequence.append(token, logprob, top)
    shown = sequence.text.push(token)
    sequence.finish_reason = _finish_reason(sequence)
    if sequence.finish_reason:
        shown += sequence.text.finish()
        if sequence.text.stopped:
            sequence.finish_reason = "stop"
    completion = _completion(sequence, sequence.finish_reason) if sequence.finish_reason else None
    number, choice = sequence.request_number, sequence.choice
    return Event(number, token, shown, logprob, completion, top, choice)


def _finish_reason(sequence: SequenceState) -> FinishReason | None:
    """Why an answer ends with its newest token; None: it goes on."""
    newest, stop_tokens = sequence.tokens[-1], sequence.request.sampling.stop_token_ids
    if sequence.text.stopped or newest in sequence.eos_token_ids or newest in stop_tokens:
        return "stop"
    return "length" if len(sequence.tokens) == sequence.limit else None


def _prompt_is_broken(sequence: SequenceState) -> bool:
    """Whether log-probabilities of the prompt, which were asked for, are no numbers."""
    return sequence.prompt_logprobs is not None and not sequence.prompt_logprobs.is_finite


def _stop_reason(sequence: SequenceState) -> int | str | None:
    """The stop string or stop token that ended an answer; None: something else did."""
    if sequence.text.stopped:
        return sequence.text.stop_string
    if sequence.finish_reason != "stop" or sequence.tokens[-1] in sequence.eos_token_ids:
        return None
    return sequence.tokens[-1]


def _error_event(sequence: SequenceState) -> Event:
    """Ends an answer for which the model gave no next token."""
    asked_too_much = _what_lets_nothing_come(sequence)
    error = asked_too_much or _what_failed(sequence)
    sequence.finish_reason = "error"
    rest = sequence.text.finish()
    completion = _completion(sequence, sequence.finish_reason, error)
    completion = replace(completion, asked_too_much=asked_too_much is not None)
    number, choice = sequence.request_number, sequence.choice
    return Event(number, NO_TOKEN, rest, None, completion, choice=choice)


def _next_place(sequence: SequenceState) -> str:
    return f"token {len(sequence.tokens) + 1} of the answer"


def _what_lets_nothing_come(sequence: SequenceState) -> str | None:
    """What the request itself asks for, so that no token may come next; None: some may."""
    if sequence.constraints is None or _prompt_is_broken(sequence):
        return None
    what = sequence.constraints.nothing_left()
    return what and f"{what} as {_next_place(sequence)}"


def _what_failed(sequence: SequenceState) -> str:
    broken = _prompt_is_broken(sequence)
    place = "a token of the prompt" if broken else _next_place(sequence)
    return (
        f"the model's logits for {place} are NaN or infinite: weights are damaged or overflow "
        "(meshwen inspect --stats finds those of a file)"
    )


def _completion(
    sequence: SequenceState, finish_reason: FinishReason, error: str | None = None
) -> Completion:
    """The whole answer of a sequence that ends now."""
    sampling, prompt = sequence.request.sampling, sequence.prompt_logprobs
    with_top = sampling.top_logprobs > 0
    return Completion(
        sequence.request.prompt_tokens,
        tuple(sequence.tokens),
        sequence.text.shown,
        finish_reason,
        tuple(sequence.logprobs) if sampling.logprobs else None,
        sequence.timer.timings(),
        sampling.seed if sampling.temperature > 0 else None,
        error,
        _stop_reason(sequence),
        tuple(sequence.top_logprobs) if sampling.logprobs and with_top else None,
        prompt.logprobs if prompt is not None else None,
        prompt.top_logprobs if prompt is not None and with_top else None,
        sequence.cached_tokens,
        sequence.choice,
    )
