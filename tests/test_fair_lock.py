# SPDX-License-Identifier: Apache-2.0
"""The lock that threads get in their order."""

import threading

import pytest

from meshwen.engine.fair_lock import FairLock
from meshwen.errors import MeshwenError
from threads import PATIENCE, results, start, wait_until


def test_threads_get_the_lock_in_the_order_in_which_they_asked():
    lock, order = FairLock(), []

    def take(name: int) -> None:
        with lock.hold() as held:
            order.append((name, held))

    with lock.hold():
        waiting = []
        for name in range(5):
            waiting.append(start(take, name))
            wait_until(lambda: len(lock._queue) == len(waiting) + 1)
    results(waiting)
    assert order == [(name, True) for name in range(5)]


def test_a_thread_that_no_longer_needs_the_lock_goes_on_without_it():
    lock, needed = FairLock(), threading.Event()

    def take() -> bool:
        with lock.hold(unless=needed.is_set) as held:
            return held

    with lock.hold():
        waiting = start(take)
        wait_until(lambda: len(lock._queue) == 2)
        needed.set()
        with lock.changed:
            lock.changed.notify_all()
        assert waiting.result(PATIENCE) is False
    needed.clear()
    assert start(take).result(PATIENCE) is True


def test_a_thread_is_refused_what_it_holds_already():
    lock = FairLock()
    with lock.hold():
        assert not lock.held_by_another_thread
        with pytest.raises(MeshwenError, match="from within one of its own steps"), lock.hold():
            pytest.fail("the lock was taken twice")
        assert start(lambda: lock.held_by_another_thread).result(PATIENCE)
    assert not lock._queue
