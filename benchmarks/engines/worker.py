# SPDX-License-Identifier: Apache-2.0
"""One engine in a process of its own: `worker.py MODULE MODEL DTYPE SEQUENCES`.

Runs in the virtual environment of that engine, so it needs the standard library alone. Each line
it reads is a measurement, a method of the engine and its arguments: {"decode": [batch, length,
steps]} or {"chat": {"turns": ...}}; it answers each with a line, {"result": what the method
returns} or {"error": the reason}. MODULE has `load(model, dtype, sequences)`, which returns an
`Engine` that runs up to so many sequences at once.
"""

import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Protocol

WARM_UP = 2


class Engine(Protocol):
    """A loaded model. Which tokens it computes does not matter, only how many.

    What an engine can beside this is in `stepping.py`.
    """

    def decode(self, batch: int, length: int, steps: int) -> float:
        """Seconds of a greedy step of `batch` sequences that start with `length` tokens each."""

    def prefill(self, length: int, runs: int) -> float:
        """Seconds from a prompt of `length` tokens to the first token of its answer."""


def median_seconds(run: Callable[[], object], count: int) -> float:
    """The median of `count` runs, after a few that do not count."""
    seconds = []
    for _ in range(WARM_UP + count):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UP:])


def main() -> None:
    module, model, dtype, sequences = sys.argv[1:]
    # Libraries print what they like; the answers go where the parent alone reads.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine: Engine = importlib.import_module(module).load(model, dtype, int(sequences))
    print("{}", file=answers)
    for line in sys.stdin:
        ((what, arguments),) = json.loads(line).items()
        try:
            measure = getattr(engine, what)
            named = isinstance(arguments, dict)
            answer = {"result": measure(**arguments) if named else measure(*arguments)}
        except Exception as error:  # Any library's: the parent reports it and goes on.
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    sys.modules["worker"] = sys.modules["__main__"]
    main()
