# SPDX-License-Identifier: Apache-2.0
"""The other side of `contained.py`: a process that answers one JSON request a line, within limits.

The watchdog is a C thread that ends the process even while one long C call holds the interpreter,
and the memory limit is the operating system's. Neither can be had for one thread of the caller's
process.
"""

import faulthandler
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Reply = dict[str, Any]


def serve(reply_to: Callable[[dict[str, Any]], Reply]) -> None:
    """Report that it runs, then answer requests until standard input closes.

    Args:
        reply_to: returns a reply, or raises whatever went wrong; the reply is then
            `{"error": ...}` in one short line.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    limit_memory(int(sys.argv[1]))
    send({})
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin.buffer:
            try:
                request = json.loads(line)
                faulthandler.dump_traceback_later(request["seconds"], exit=True, file=nowhere)
                reply = reply_to(request)
            except MemoryError:
                reply = problem("it needs too much memory")
            except BaseException as error:  # a panic of the tokenizers library is no Exception
                reply = problem(f"{type(error).__name__}: {error}")
            faulthandler.cancel_dump_traceback_later()
            send(reply)


def problem(text: str) -> Reply:
    """The reply for a failure, in one short line."""
    return {"error": " ".join(text[:500].split())}


def limit_memory(size: int) -> None:
    """Cap this process's address space at `size` bytes where the system can."""
    # Windows has no such module, and macOS may refuse; the time limit still holds.
    with suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def send(reply: Reply) -> None:
    """Write one reply line."""
    sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
    sys.stdout.buffer.flush()
