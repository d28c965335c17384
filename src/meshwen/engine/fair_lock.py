# SPDX-License-Identifier: Apache-2.0
"""A lock that threads get in the order in which they asked: Python's own promise no order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from meshwen.errors import MeshwenError


class FairLock:
    """Says which thread may use a model's devices now.

    Attributes:
        changed: guards what threads share; notified when the lock is released, and by whoever makes
            a condition of `hold` true. Reentrant: a finalizer, which Python may run anywhere, can
            use it.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self._queue: deque[object] = deque()  # The holder's ticket, then those who wait.
        self._holder: object | None = None
        self._thread: int | None = None  # The holder's.

    @property
    def held_by_another_thread(self) -> bool:
        """Whether another thread holds the lock."""
        return self._thread not in (None, threading.get_ident())

    @contextmanager
    def hold(self, unless: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Waits for the lock and holds it during the block, unless a condition comes true first.

        Args:
            unless: whether the lock is no longer needed; called with `changed` held.

        Yields:
            Whether this thread holds the lock.

        Raises:
            MeshwenError: this thread holds the lock already: it would wait for itself.
        """
        if self._thread == threading.get_ident():
            raise MeshwenError(
                "the model was called from within one of its own steps (an on_event, or a signal "
                "handler): there only submit and cancel may be used"
            )
        ticket = object()
        try:
            with self.changed:
                self._queue.append(ticket)
                self.changed.wait_for(lambda: unless() or self._is_next(ticket))
                if not unless():
                    self._holder, self._thread = ticket, threading.get_ident()
            yield self._holder is ticket
        finally:  # By what is there: an interrupt may have come anywhere above.
            with self.changed:
                if ticket in self._queue:
                    self._queue.remove(ticket)
                if self._holder is ticket:
                    self._holder = self._thread = None
                self.changed.notify_all()

    def _is_next(self, ticket: object) -> bool:
        return self._holder is None and self._queue[0] is ticket
