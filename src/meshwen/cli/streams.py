# SPDX-License-Identifier: Apache-2.0
"""stdin, stdout and stderr as the process was given them: closed, full, or read by nobody."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path

from meshwen.errors import MeshwenError

NOBODY_READS = 1


def open_streams() -> None:
    """Makes the standard streams safe to write to.

    A closed stderr is replaced: Python would print to stdout in its place. The descriptor of a
    closed stream is taken, so that no file gets it, to which a library would then write. Text that
    the encoding of the terminal or pipe lacks comes out escaped, not as an error.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def check_stdout() -> None:
    """Refuses a closed stdout, where answers would be lost.

    Raises:
        MeshwenError: it is closed.
    """
    if sys.stdout is None:
        raise MeshwenError("stdout is closed: send it to a file, or to /dev/null")


def output_failure() -> OSError | None:
    """Why what was printed to stdout cannot be written; None where all of it has been."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        return error
    return None


def drop_output(error: OSError) -> tuple[int, str]:
    """Gives up on what could not be written: an exit status, and what to say, if anything."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())  # Python tries once more at its end.
        os.close(descriptor)
    if error.errno == errno.EPIPE:
        return NOBODY_READS, ""
    return 2, f"cannot write to stdout: {error.strerror}"
