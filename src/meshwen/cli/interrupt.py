# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C while an answer is made: once to stop the answer, twice to end the program."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130


@contextmanager
def ctrl_c() -> Iterator[threading.Event]:
    """Gives an event that Ctrl-C sets; a second Ctrl-C ends the program at once.

    Python runs its signal handlers between two of its own instructions, so none runs while XLA
    compiles or computes. What the system calls writes to a socket at once, though, and a thread
    reads that.
    """
    pressed = threading.Event()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    watcher = threading.Thread(target=_end_at_the_second, args=(reader,), daemon=True)
    watcher.start()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    wakeup_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield pressed
    finally:
        signal.set_wakeup_fd(wakeup_before)
        signal.signal(signal.SIGINT, before)
        writer.close()
        watcher.join()
        reader.close()


def _end_at_the_second(reader: socket.socket) -> None:
    """Reads the number of each signal that comes, until the other end is closed."""
    presses = 0
    while number := reader.recv(1):
        presses += number[0] == signal.SIGINT
        if presses == 2:
            os._exit(INTERRUPTED)
