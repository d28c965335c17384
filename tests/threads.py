# SPDX-License-Identifier: Apache-2.0
"""Threads for tests: what they return or raise, and none that outlives the test run."""

import threading
import time
from concurrent.futures import Future

PATIENCE = 120  # seconds: what should end has hung


def start(function, *arguments) -> Future:
    """Runs a function in a thread that does not outlive the test run."""
    future = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def results(futures) -> list:
    """What functions returned or raised."""
    return [future.exception(PATIENCE) or future.result() for future in futures]


def wait_until(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)
