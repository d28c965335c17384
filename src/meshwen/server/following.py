# SPDX-License-Identifier: Apache-2.0
"""A model over several processes: process 0 has the clients, and the others do what it does.

All processes have to make the same calls of the engine in the same order: before each of its own,
process 0 tells the others which.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from meshwen.engine.engine import Engine
from meshwen.engine.request import Event, Request
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError
from meshwen.parallel.distributed import leave, shared

logger = logging.getLogger(__name__)
_DEFECT = 3


class LeadingEngine:
    """Process 0's engine, for `EngineThread`: the others `follow` what it is asked.

    Args:
        engine: the engine, which one thread alone may call.
    """

    def __init__(self, engine: Engine):
        self._engine = engine

    @property
    def busy(self) -> bool:
        """Whether there is something to compute."""
        return self._engine.busy

    @property
    def waiting(self) -> int:
        """Requests whose computation has not begun."""
        return self._engine.waiting

    def unfinished(self, number: int) -> bool:
        """Whether a request waits or runs."""
        return self._engine.unfinished(number)

    def check(self, request: Request, name: str) -> None:
        """Refuses a request that cannot be answered: see `Engine.check`."""
        self._engine.check(request, name)

    def check_grammar(self, grammar: str) -> None:
        """Refuses a grammar that no answer can be held to: see `Engine.check_grammar`."""
        self._engine.check_grammar(grammar)

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> int:
        """Takes a request, in all processes: see `Engine.submit`."""
        _tell("submit", asdict(request))
        return self._engine.submit(request, on_event)

    def cancel(self, number: int) -> None:
        """Drops a request, in all processes: see `Engine.cancel`."""
        _tell("cancel", number)
        self._engine.cancel(number)

    def step(self) -> None:
        """Takes a step, in all processes. One that fails ends this process, and so the others."""
        _tell("step")
        try:
            self._engine.step()
        except Exception:
            logger.exception("a step failed: the processes end, as each may have another state now")
            leave(_DEFECT)
            raise

    def close(self) -> None:
        """Lets the others go."""
        _tell("close")


def follow(engine: Engine) -> None:
    """Does what process 0 is asked, until it closes.

    Raises:
        Exception: a step failed.
    """
    while True:
        call, value = shared("call of the engine", lambda: None)
        if call == "close":
            return
        if call == "submit":
            request = _request(value)
            with suppress(MeshwenError):  # Process 0 has the same, and somebody to tell.
                engine.submit(request, _ignore)
        elif call == "cancel":
            engine.cancel(value)
        else:
            engine.step()


def _tell(call: str, value: Any = None) -> None:
    try:
        shared("call of the engine", lambda: [call, value])
    except Exception:
        logger.exception("the other processes cannot be told what to do: all end")
        leave(_DEFECT)
        raise


def _request(fields: dict[str, Any]) -> Request:
    """A request of what `asdict` gives and JSON keeps."""
    sampling = SamplingParams(**fields.pop("sampling"))
    return Request(sampling=sampling, **fields)


def _ignore(event: Event) -> None:
    """Process 0 has the one who asked."""
