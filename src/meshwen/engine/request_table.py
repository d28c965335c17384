# SPDX-License-Identifier: Apache-2.0
"""The requests that are unfinished, and what threads leave for the next step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from meshwen.engine.sequence import SequenceState
from meshwen.errors import MeshwenError


class Run(Protocol):
    """The requests of one call of `Engine.run`.

    Attributes:
        failure: why they will not be finished.
    """

    failure: MeshwenError | None

    def fail(self, number: int, error: Exception) -> None:
        """Notes a failure: `error` came when a token of a request was to be delivered."""


@dataclass(frozen=True)
class LiveRequest:
    """An unfinished request.

    Attributes:
        sequences: the states of its answers.
        run: the call of `Engine.run` that it belongs to; None for one that was submitted.
        thread: that submitted it.
    """

    sequences: tuple[SequenceState, ...]
    run: Run | None
    thread: int

    @property
    def number(self) -> int:
        """The request's."""
        return self.sequences[0].number

    @property
    def begun(self) -> list[SequenceState]:
        """The answers that have not ended, without those that begin with another."""
        later = {id(one) for sequence in self.sequences for one in sequence.siblings}
        return [one for one in self.sequences if not one.ended and id(one) not in later]

    def cancel(self) -> None:
        """Nobody wants more of it."""
        for one in self.sequences:
            one.cancelled = True


class RequestTable:
    """What the threads that call an engine share; whoever changes it holds `FairLock.changed`.

    A finalizer may cancel requests at any point, so what is iterated over is copied first.

    Attributes:
        live: the unfinished requests, by number.
    """

    def __init__(self) -> None:
        self.live: dict[int, LiveRequest] = {}
        self._submitted = 0
        self._new: list[SequenceState] = []  # Those that no step has taken yet.
        self._cancelled = False  # Some that steps have taken.
        self._errors: list[Exception] = []  # That `Engine.step` has yet to raise.

    @property
    def busy(self) -> bool:
        """Whether a request is unfinished, or there is an error to raise."""
        return bool(self.live or self._errors)

    @property
    def waiting(self) -> int:
        """Requests whose prefill has not begun."""
        return sum(live.sequences[0].timer.waits for live in list(self.live.values()))

    def next_number(self, answers: int) -> int:
        """The number of a new request; each of its answers takes one, from that on."""
        number, self._submitted = self._submitted, self._submitted + answers
        return number

    def add(self, request: LiveRequest) -> None:
        """Leaves a request for the next step."""
        self.live[request.number] = request
        self._new += request.begun

    def cancel(self, number: int) -> None:
        """Cancels a request, if it is unfinished."""
        if (live := self.live.pop(number, None)) is not None:
            live.cancel()
            self._cancelled = True

    def cancel_run(self, run: Run) -> None:
        """Cancels what is unfinished of a run."""
        for number in [n for n, live in list(self.live.items()) if live.run is run]:
            self.cancel(number)

    def finish(self, number: int) -> None:
        """Takes note that an answer of a request has had its last token."""
        live = self.live.get(number)
        if live is not None and all(one.ended for one in live.sequences):
            del self.live[number]

    def fail(self, number: int, error: Exception) -> None:
        """Ends a request whose token could not be delivered.

        Whoever waits for its run is to raise the error; for one that was submitted, `Engine.step`.
        """
        live = self.live.pop(number, None)
        if live is not None:
            live.cancel()
            self._cancelled = True
        if live is not None and live.run is not None:
            live.run.fail(number, error)
        else:
            self._errors.append(error)

    def take_new(self) -> tuple[list[SequenceState], bool]:
        """Requests since the last step, and whether some were cancelled since."""
        new, self._new = self._new, []
        cancelled, self._cancelled = self._cancelled, False
        return new, cancelled

    def take_errors(self) -> list[Exception]:
        """Errors that are to be raised."""
        errors, self._errors = self._errors, []
        return errors

    def lose(self, error: BaseException, delivering: int | None, thread: int | None) -> None:
        """Ends the requests that a step which broke off has taken with it.

        An interrupt says nothing against the requests themselves: they wait again, but for the one
        whose token was being delivered. Other errors end all that a step had taken.

        Args:
            error: what broke the step off.
            delivering: the request whose token was being delivered.
            thread: one that gets the error itself, and need not learn of it by another.
        """
        new = {sequence.request_number for sequence in self._new}
        lost = [number for number in list(self.live) if number not in new]
        if not isinstance(error, Exception):
            live = list(self.live.items())
            self._new = [s for number, one in live if number != delivering for s in one.begun]
            lost = [] if delivering is None else [delivering]
        for one in [one for number in lost if (one := self.live.pop(number, None))]:
            failure = MeshwenError("these requests were lost when a step of others failed")
            failure.__cause__ = error
            if one.run is not None:
                one.run.failure = failure
            elif one.thread != thread:
                self._errors.append(failure)
