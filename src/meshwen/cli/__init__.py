# SPDX-License-Identifier: Apache-2.0
"""The command line: `meshwen generate`, `chat`, `inspect` and `verify`, one file a command."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main", "run"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    Args:
        arguments: without the program's name; None takes the process's own.
    """
    from meshwen.cli.app import main

    return main(arguments)


def run() -> NoReturn:
    """The `meshwen` program: runs the process's own command line and ends the process.

    Signals are taken before the commands are imported, which takes its time. The socket that they
    are written to must not be given the number of a stream that is closed.
    """
    from meshwen.cli.interrupt import run_to_the_end
    from meshwen.cli.streams import open_streams

    open_streams()
    if "--debug" not in sys.argv:
        # XLA warns of each program from the cache, in lines of 4 KB, that it was compiled with
        # tuning flags which no CPU has; what stops it comes as an exception all the same.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    run_to_the_end(main)
