# SPDX-License-Identifier: Apache-2.0
"""Signals, and how the program ends.

Ctrl-C and SIGTERM raise an exception in the main thread, so that what is open is closed. A second
one ends the program at once, as does a first that has not ended it within 5 s. An exception that a
library swallows is raised again. While a chat answers, Ctrl-C only stops the answer; a server lets
its requests finish.

Nothing is raised while a module is imported: the C++ of an extension may not survive it.

Python runs its signal handlers between two of its own instructions, so none runs while XLA compiles
or computes. What the system calls writes to a socket at once, though, and a thread reads that.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import NoReturn

INTERRUPTED = 128 + signal.SIGINT  # As a shell says it.
_NOBODY_READS, _USER_MUST_CHANGE, _DEFECT = 1, 2, 3
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
_GRACE = 5.0  # seconds that the main thread has to end
_LAST_WORDS = 1.0  # seconds for what is still to be written, maybe to a pipe that nobody reads
_RETRY = 0.05  # seconds
_ECHO = 1.0  # seconds within which the thread that watches hears of what the handler has seen
_SHOW_CURSOR = "\x1b[?25h"  # A progress bar hides it.


@dataclass
class _Fate:
    """Of a signal's exception, which may be gone: whether somebody has `taken` it."""

    taken: bool = False


class Interrupted(KeyboardInterrupt):
    """Ctrl-C."""

    def __init__(self) -> None:
        super().__init__()
        self.fate = _Fate()


class Terminated(SystemExit):
    """SIGTERM, or the terminal is gone.

    Attributes:
        code: the exit status.
    """

    code: int

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.fate = _Fate()


def take(error: BaseException) -> None:
    """Says that a caught exception is dealt with: if it is a signal's, it is not raised again.

    Args:
        error: a signal's exception, one that was raised from it, or any other.
    """
    for one in (error, error.__cause__):
        if isinstance(one, Interrupted | Terminated):
            one.fate.taken = True


def take_last() -> None:
    """Takes the last signal's exception, of which a library has left a status alone."""
    ending = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    if isinstance(ending, _Ending):
        ending.take_last()


def run_to_the_end(command: Callable[[], int]) -> NoReturn:
    """Runs a command and ends the process with the status that it returns.

    For the entry of a process alone: it takes the process's signals, except those that the process
    was started to ignore.

    The interpreter is not torn down: threads in which XLA still compiles would use what that
    destroys, and end the process by a segmentation fault. What was written is flushed; functions
    registered with `atexit` do not run.
    """
    ending = _Ending()
    ending.take_signals()
    try:
        status = command()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else _DEFECT
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BaseException:  # A panic in a library's Rust is no Exception.
        _say(traceback.format_exc(), end="")
        status = _DEFECT
    finally:
        ending.close()
    status = ending.status(status)
    unwritten = _flush()
    os._exit(status or unwritten)


class _Ending:
    """The signal that is about to end the program, if any.

    It is under way from its coming until its exception is gone, which is alive as long as blocks
    are left because of it. Code that catches it and goes on, as a prompt does, takes it. One that
    is gone and not taken was swallowed, by a library mostly; so it is raised again.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # Handlers of two signals may run one within the other.
        self._number = 0
        self._deadline = 0.0
        self._error: Callable[[], BaseException | None] | None = None  # None: not raised yet.
        self._fate = _Fate()
        self._early: float | None = None  # When the handler ran before the thread that watches.
        self._sent: deque[float] = (
            deque()
        )  # When own signals were sent, which the thread will hear.
        self._own = False  # The next signal that the handler sees is such a one.
        self._closed = False

    def take_signals(self) -> None:
        """Installs the handlers, and the thread that watches."""
        for name in _SIGNALS:
            number = getattr(signal, name, None)  # Windows has no SIGHUP.
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._raise)
        self._others_unraisable, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self._sockets = reader, writer = _socket_pair()  # Kept: closed, they would end the thread.
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(reader, self._came, self._left), daemon=True).start()

    def close(self) -> None:
        """Lets any signal end the program at once: there is nothing left to close."""
        self._closed = True

    def status(self, status: int) -> int:
        """`status`; the signal's where its exception was swallowed and a defect came of it."""
        lost = self._number and not self._fate.taken
        return 128 + self._number if lost and status == _DEFECT else status

    def take_last(self) -> None:
        """The last signal's exception is not raised again."""
        self._fate.taken = True

    def _came(self, number: int) -> None:
        with self._lock:
            while self._sent:
                if time.monotonic() - self._sent.popleft() < _ECHO:
                    return
            early, self._early = self._early, None
            # While a prompt is typed, asyncio hears in place of that thread.
            if early is not None and time.monotonic() - early < _ECHO:
                return
            if self._closed or self._left() is not None:
                _end_at_once(128 + number)
            else:
                self._begin(number)

    def _begin(self, number: int) -> None:
        self._number, self._error = number, None
        self._deadline = time.monotonic() + _GRACE

    def _left(self) -> float | None:
        """Seconds until the program ends at once; None where no signal is under way."""
        if not self._number or (self._error is not None and self._error() is None):
            return None
        left = self._deadline - time.monotonic()
        if left <= 0:
            _end_at_once(128 + self._number)
        return left

    def _raise(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal, in the main thread."""
        with self._lock:
            own, self._own = self._own, False
            if self._closed:
                return
            if self._left() is None:
                self._begin(number)
                self._early = None if own else time.monotonic()
            if _imports(frame):
                self._send_later(number, lambda: True)
                return
            error = Interrupted() if number == signal.SIGINT else Terminated(128 + number)
            self._fate = error.fate
            self._error = weakref.ref(error, partial(self._gone, number, error.fate))
        try:
            raise error
        finally:
            del error  # This frame, which the exception refers to, would keep it alive.

    def _gone(self, number: int, fate: _Fate, _: object) -> None:
        """Raises an exception once more, soon, that is gone and is not taken by then."""
        self._send_later(number, lambda: not fate.taken)

    def _send_later(self, number: int, needed: Callable[[], bool]) -> None:
        """Sends the main thread a signal, soon, if it is needed then."""

        def send() -> None:
            if not self._closed and needed():
                self._sent.append(time.monotonic())
                self._own = True
                _signal_main_thread(number)

        timer = threading.Timer(_RETRY, send)
        timer.daemon = True
        timer.start()

    def _unraisable(self, found: sys.UnraisableHookArgs) -> None:
        """Reports what came in a callback that no exception can leave, unless it is a signal's."""
        if not isinstance(found.exc_value, Interrupted | Terminated):
            self._others_unraisable(found)


@contextmanager
def ctrl_c(stop: Callable[[], None] = lambda: None) -> Iterator[threading.Event]:
    """Gives an event that Ctrl-C sets; a second Ctrl-C ends the program at once.

    Args:
        stop: also called then, by the main thread.
    """
    pressed = threading.Event()

    def handle(number: int) -> None:
        pressed.set()
        stop()

    with handled(handle, ("SIGINT",)):
        yield pressed


@contextmanager
def handled(handle: Callable[[int], None], names: Sequence[str] = _SIGNALS) -> Iterator[None]:
    """Has signals handled, in the place of raising; the second that comes ends the program at once.

    Args:
        handle: called with a signal's number, by the main thread.
        names: the signals; those that the process was started to ignore stay ignored.
    """
    numbers = [n for name in names if (n := getattr(signal, name, None)) is not None]
    numbers = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]
    came_before = 0
    reader, writer = _socket_pair()

    def came(number: int) -> None:
        nonlocal came_before
        if number not in numbers:  # It is for whoever watched before.
            with suppress(OSError):
                os.write(wakeup_before, bytes([number]))
            return
        came_before += 1
        if came_before == 2:
            _end_at_once(128 + number)

    before = {n: signal.signal(n, lambda number, frame: handle(number)) for n in numbers}
    wakeup_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, came, lambda: None), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        watcher.join()
        reader.close()


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported, in a frame or in one that called it."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _signal_main_thread(number: int) -> None:
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:  # On Windows this does not end a sleep.
        signal.raise_signal(number)


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    """A reader, and a writer for `signal.set_wakeup_fd`."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    return reader, writer


def _watch(
    reader: socket.socket, came: Callable[[int], None], left: Callable[[], float | None]
) -> None:
    """Passes on the number of each signal that comes, until the other end is closed.

    Args:
        reader: what the numbers come from.
        came: takes a number.
        left: is asked whenever so many seconds have passed, and after each signal.
    """
    while True:
        reader.settimeout(left())
        try:
            number = reader.recv(1)
        except TimeoutError:
            continue
        if not number:
            return
        came(number[0])


def _end_at_once(status: int) -> NoReturn:
    """Ends the process from any thread, whatever the others do."""
    last_words = threading.Thread(target=_flush, daemon=True)
    last_words.start()
    last_words.join(_LAST_WORDS)
    with suppress(OSError, ValueError):
        if os.isatty(2):
            os.write(2, _SHOW_CURSOR.encode())
    os._exit(status)


def _flush() -> int:
    """Writes what Python has kept of stdout and stderr; an exit status, 0 where stdout took it."""
    status = 0
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except BrokenPipeError:
        status = _NOBODY_READS
    except (OSError, ValueError) as error:
        status = _USER_MUST_CHANGE
        _say(f"meshwen: error: the output cannot be written: {error}")
    _say("", end="")
    return status


def _say(text: str, end: str = "\n") -> None:
    with suppress(OSError, ValueError):
        print(text, end=end, file=sys.stderr, flush=True)
