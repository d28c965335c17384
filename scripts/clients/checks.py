# SPDX-License-Identifier: Apache-2.0
"""Checks of one client: each is a function, and prints a line."""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import time
from collections.abc import Callable

URL = os.environ.get("CHECK_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("CHECK_KEY", "none")
MODEL = os.environ.get("CHECK_MODEL", "demo")
QUESTION = os.environ.get("CHECK_QUESTION", "Hello")
ANSWER = os.environ.get("CHECK_ANSWER", "")  # What its answer ends with.
MESSAGES = [{"role": "user", "content": QUESTION}]
LIMIT = 200  # tokens of an answer

WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
_checks: list[Callable[[], object]] = []


def check(function: Callable[[], object]) -> Callable[[], object]:
    """Adds a check, in the order of the file; what it raises has failed."""
    _checks.append(function)
    return function


def expect(found: object, expected: object) -> None:
    """Raises AssertionError where they differ."""
    if found != expected:
        raise AssertionError(f"found {found!r:.300}, expected {expected!r:.300}")


def expect_solved(text: str) -> None:
    """Raises AssertionError where a text is not the right answer to the question."""
    if not text.strip().endswith(ANSWER):
        raise AssertionError(f"{text!r:.300} does not end with {ANSWER!r}")


def run_all() -> None:
    """Runs all checks; exits with status 1 where one fails."""
    client, failed = os.path.basename(sys.argv[0]).partition(".")[0], 0
    for one in _checks:
        began, name = time.monotonic(), one.__name__.replace("_", " ")
        try:
            found = one()
            if inspect.iscoroutine(found):
                asyncio.run(found)
        except Exception as error:
            failed += 1
            text = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"FAILED  {client}: {name}: {text[:600]}", flush=True)
        else:
            print(f"ok      {client}: {name} ({time.monotonic() - began:.1f} s)", flush=True)
    sys.exit(1 if failed else 0)
