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
        sequence: its state.
        run: the call of `Engine.run` that it belongs to; None for one that was submitted.
        thread: that submitted it.
    """

    sequence: SequenceState
    run: Run | None
    thread: int


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
        return sum(live.sequence.timer.waits for live in list(self.live.values()))

    def next_number(self) -> int:
        """The number of a new request."""
        number, self._submitted = self._submitted, self._submitted + 1
        return number

    def add(self, request: LiveRequest) -> None:
        """Leaves a request for the next step."""
        self.live[request.sequence.number] = request
        self._new.append(request.sequence)

    def cancel(self, number: int) -> None:
        """Cancels a request, if it is unfinished."""
        if (live := self.live.pop(number, None)) is not None:
            live.sequence.cancelled = self._cancelled = True

    def cancel_run(self, run: Run) -> None:
        """Cancels what is unfinished of a run."""
        for number in [n for n, live in list(self.live.items()) if live.run is run]:
            self.cancel(number)

    def finish(self, number: int) -> None:
        """Takes note that a request has had its last token."""
        self.live.pop(number, None)

    def fail(self, number: int, error: Exception) -> None:
        """Ends a request whose token could not be delivered.

        Whoever waits for its run is to raise the error; for one that was submitted, `Engine.step`.
        """
        live = self.live.pop(number, None)
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
        new = {sequence.number for sequence in self._new}
        lost = [number for number in list(self.live) if number not in new]
        if not isinstance(error, Exception):
            live = list(self.live.items())
            self._new = [one.sequence for number, one in live if number != delivering]
            lost = [] if delivering is None else [delivering]
        for one in [one for number in lost if (one := self.live.pop(number, None))]:
            failure = MeshwenError("these requests were lost when a step of others failed")
            failure.__cause__ = error
            if one.run is not None:
                one.run.failure = failure
            elif one.thread != thread:
                self._errors.append(failure)
