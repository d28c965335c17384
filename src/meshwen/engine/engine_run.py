# SPDX-License-Identifier: Apache-2.0
"""The requests of one call of `Engine.run`, and their events as the caller fetches them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from meshwen.common.arguments import brief
from meshwen.engine.agreement import check_requests
from meshwen.engine.compiled_grammars import CompiledGrammar
from meshwen.engine.request import Event, Request
from meshwen.engine.shared_core import SharedCore
from meshwen.errors import MeshwenError


class EngineRun:
    """Requests that are answered together, and those of their events that were not fetched.

    Args:
        shared: what steps them.
        requests: submitted when the first event is asked for.
        grammars: that of each, compiled; None: it has none.

    Attributes:
        failure: why they will not be finished.
    """

    def __init__(
        self,
        shared: SharedCore,
        requests: Sequence[Request],
        grammars: Sequence[CompiledGrammar | None],
    ):
        self._shared, self._grammars = shared, grammars
        self._requests: Sequence[Request] | None = requests  # None once they are submitted.
        self._numbers: dict[int, int] = {}  # The engine's, of unfinished requests, to the caller's.
        self._left: dict[int, int] = {}  # Of each of these its unfinished answers.
        self._events: deque[Event] = deque()
        self.failure: MeshwenError | None = None

    def pull(self) -> Event | None:
        """Waits for the next event, taking steps while it has the lock; None: there are no more.

        Raises:
            MeshwenError: the requests were lost, or a token of one could not be delivered.
            BaseException: this thread's step broke off.
        """
        changed = self._shared.lock.changed
        with changed:
            self._shared.check_thread()
        try:
            with changed:
                self._submit()
            while True:
                with changed:
                    if self._ready():
                        return self._take()
                with self._shared.hold(unless=self._ready) as held:
                    if held:
                        self._shared.step()
        except BaseException:
            self.close()
            raise

    def _submit(self) -> None:
        """Submits the requests, the first time."""
        requests, self._requests = self._requests, None
        if requests and self._shared.one_thread:
            check_requests(requests)
        for number, request in enumerate(requests or ()):
            grammar = self._grammars[number]
            added = self._shared.add(request, grammar, self._events.append, self)
            self._numbers[added], self._left[added] = number, request.sampling.n

    def close(self) -> None:
        """Cancels what is unfinished; who waits in `pull` gets None."""
        with self._shared.lock.changed:
            # Not by `_numbers`: an interrupt may have come before a request's was noted.
            self._shared.requests.cancel_run(self)
            self._requests, self.failure = None, None
            self._numbers.clear()
            self._shared.lock.changed.notify_all()

    def fail(self, number: int, error: Exception) -> None:
        """Ends the run when its events so far are fetched; its first failure is the one raised."""
        mine = self._numbers.get(number)  # None: an interrupt ended the run as it began.
        if mine is not None and self.failure is None:
            self.failure = MeshwenError(
                f"prompt {mine + 1}: a token of its answer could not be delivered: {brief(error)}"
            )
            self.failure.__cause__ = error

    def _ready(self) -> bool:
        return bool(self._events or self.failure or not self._numbers)

    def _take(self) -> Event | None:
        if not self._numbers:
            return None
        if not self._events:
            assert self.failure
            raise self.failure
        event = self._events.popleft()
        number = self._numbers[event.request]
        if event.completion is not None:
            self._left[event.request] -= 1
            if not self._left[event.request]:
                del self._numbers[event.request], self._left[event.request]
        return replace(event, request=number)
