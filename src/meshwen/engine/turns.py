# SPDX-License-Identifier: Apache-2.0
"""One thread at a time, in the order in which they came: Python's locks promise no order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from meshwen.errors import MeshwenError


class Turns:
    """Who may use a model's devices now.

    Attributes:
        changed: guards what threads share; told when a turn ends, and by whoever makes something
            `ready`. Reentrant: a finalizer, which Python may run anywhere, can use it.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self._line: deque[object] = deque()
        self._holder: object | None = None
        self._thread: int | None = None  # The holder's.

    @property
    def busy_elsewhere(self) -> bool:
        """Whether another thread has the turn."""
        return self._thread not in (None, threading.get_ident())

    @contextmanager
    def take(self, ready: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Waits for a turn, which lasts for the block, unless `ready` comes true first.

        Args:
            ready: whether no turn is needed any more; called with `changed` held.

        Yields:
            Whether this thread has the turn.

        Raises:
            MeshwenError: this thread has the turn already: it would wait for itself.
        """
        if self._thread == threading.get_ident():
            raise MeshwenError(
                "the model was called from within one of its own steps (an on_event, or a signal "
                "handler): there only submit and cancel may be used"
            )
        ticket = object()
        try:
            with self.changed:
                self._line.append(ticket)
                self.changed.wait_for(lambda: ready() or self._is_next(ticket))
                if not ready():
                    self._holder, self._thread = ticket, threading.get_ident()
            yield self._holder is ticket
        finally:  # By what is there: an interrupt may have come anywhere above.
            with self.changed:
                if ticket in self._line:
                    self._line.remove(ticket)
                if self._holder is ticket:
                    self._holder = self._thread = None
                self.changed.notify_all()

    def _is_next(self, ticket: object) -> bool:
        return self._holder is None and self._line[0] is ticket
