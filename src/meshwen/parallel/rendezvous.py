# SPDX-License-Identifier: Apache-2.0
"""Processes find each other, and check who they are, before `jax.distributed` starts.

JAX waits for days for a process that never comes, and a second one of the same number ends those
that are at work. So process 0 first listens at the coordinator's address itself, hears from each of
the others how many they are and which it is, and reports to all of them whether that fits.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import ExitStack, suppress
from typing import Any

from meshwen.errors import MeshwenError

_GREETING = b"meshwen rendezvous 1\n"
_LONGEST = 4096  # bytes of a line
_PATIENCE = 2.0  # seconds for the first line of who has connected
_MARGIN = 10.0  # seconds after which one more than process 0 has waited for it in vain


def gather(coordinator: str, processes: int, timeout: float) -> None:
    """Process 0's part: waits for all others, and reports to each whether they fit.

    Raises:
        MeshwenError: the port is taken, not all came in time, one was started with another number
            of processes, or two have the same id.
    """
    deadline = time.monotonic() + timeout
    with ExitStack() as opened:
        listener = opened.enter_context(_listener(coordinator, processes))
        came: dict[int, tuple[socket.socket, str]] = {}
        try:
            while len(came) < processes - 1:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    other, _ = listener.accept()
                except TimeoutError:
                    raise MeshwenError(_missing(coordinator, processes, came, timeout)) from None
                opened.enter_context(other)
                _admit(other, processes, came)
        except MeshwenError as error:
            _report(came, {"error": str(error)})
            raise
        listener.close()  # Nobody must take it for JAX's.
        _report(came, {})
        for other, _ in came.values():  # They close first: the port is free at once.
            other.settimeout(_PATIENCE)
            with suppress(OSError):
                other.recv(1)


def join(coordinator: str, processes: int, index: int, timeout: float) -> None:
    """The others' part: reports to process 0 who this is, and waits for its verdict.

    Raises:
        MeshwenError: nobody answers, what listens is no process 0 that waits, or what it refuses.
    """
    with _connected(coordinator, timeout) as connection:
        try:
            greeting = _line(connection, _MARGIN)
        except OSError:
            greeting = b""
        if greeting != _GREETING:
            raise MeshwenError(
                f"coordinator {coordinator}: what listens there waits for no process; all of its "
                "processes have come already, or it is another program: check the address, and "
                "that each process has an id of its own"
            )
        hello = {"processes": processes, "index": index, "name": _name()}
        try:
            connection.sendall(json.dumps(hello).encode() + b"\n")
            verdict = json.loads(_line(connection, timeout + _MARGIN))
        except (OSError, ValueError):
            raise MeshwenError(
                f"coordinator {coordinator}: process 0 ended while it waited for the others; look "
                "there for the cause"
            ) from None
    if error := verdict.get("error"):
        raise MeshwenError(str(error))


def wait_for_listener(coordinator: str, timeout: float) -> None:
    """Waits until somebody listens; JAX would end the process where nobody does."""
    _connected(coordinator, timeout).close()


def split_address(coordinator: str) -> tuple[str, int]:
    """Host, without the brackets of IPv6, and port."""
    host, _, port = coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def _listener(coordinator: str, processes: int) -> socket.socket:
    host, port = split_address(coordinator)
    loopback = host == "localhost" or host.startswith("127.") or host == "::1"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Of other addresses it need not know its own: there may be a translation between.
        listener.bind((host if loopback else "", port))
        listener.listen(processes + 8)
    except OSError as error:
        listener.close()
        raise MeshwenError(
            f"coordinator {coordinator}: process 0 cannot listen there ({error.strerror}); "
            "give another port, the same to every process"
        ) from None
    return listener


def _connected(coordinator: str, timeout: float) -> socket.socket:
    deadline = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection(split_address(coordinator), timeout=5)
        except OSError as error:
            if time.monotonic() > deadline:
                raise MeshwenError(
                    f"coordinator {coordinator}: no answer within {timeout:.0f} s ({error}); "
                    "process 0 listens there once it is started: start it, and check the address"
                ) from None
        time.sleep(0.2)


def _admit(
    other: socket.socket, processes: int, came: dict[int, tuple[socket.socket, str]]
) -> None:
    """Hears who has connected; what is no process of meshwen is left alone."""
    other.settimeout(_PATIENCE)
    try:
        other.sendall(_GREETING)
        hello: dict[str, Any] = json.loads(_line(other, _PATIENCE))
        theirs, index, name = int(hello["processes"]), int(hello["index"]), str(hello["name"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if not 0 < index < theirs:
        return
    before = came.get(index)
    came[index] = other, name
    if theirs != processes:
        raise MeshwenError(
            f"process 0 was started with {processes} processes, process {index} ({name}) with "
            f"{theirs}: give the same number to all"
        )
    if before is not None and not _has_left(before[0]):
        came[-1] = before  # Both hear of it.
        raise MeshwenError(
            f"process id {index} was given twice, to {before[1]} and {name}: give each process an "
            f"id of its own, 0 to {processes - 1}"
        )


def _has_left(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _report(came: dict[int, tuple[socket.socket, str]], verdict: dict[str, str]) -> None:
    for other, _ in came.values():
        with suppress(OSError):
            other.settimeout(_PATIENCE)
            other.sendall(json.dumps(verdict).encode() + b"\n")


def _line(connection: socket.socket, patience: float) -> bytes:
    """A line with its end, or what there is of it; raises TimeoutError after so many seconds."""
    found, deadline = b"", time.monotonic() + patience
    while not found.endswith(b"\n") and len(found) < _LONGEST:
        if (left := deadline - time.monotonic()) <= 0:
            raise TimeoutError
        connection.settimeout(left)
        if not (more := connection.recv(_LONGEST - len(found))):
            break
        found += more
    return found


def _missing(
    coordinator: str, processes: int, came: dict[int, tuple[socket.socket, str]], timeout: float
) -> str:
    missing = [str(index) for index in range(1, processes) if index not in came]
    those = "process " if len(missing) == 1 else "processes "
    some = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
    return (
        f"coordinator {coordinator}: not all of the {processes} processes came within "
        f"{timeout:.0f} s; {those}{some} did not: start each with its own id, 0 to {processes - 1}"
    )


def _name() -> str:
    return f"{socket.gethostname()[:64]}, process {os.getpid()}"
