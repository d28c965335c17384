# SPDX-License-Identifier: Apache-2.0
"""What commands report: everything but data goes to stderr."""

from __future__ import annotations

import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    from meshwen.engine.request import Completion, Event

_PIPED_WIDTH = 100
_SPEED_PERIOD = 600.0  # seconds over which progress is measured: an answer may take minutes
_LINE_PERIOD = 60.0  # seconds
# But newlines, and tabs, of which blanks are made: a terminal would obey them. The last two ranges
# change the direction of writing, so that a text reads as another.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def note(text: str) -> None:
    """Writes one line to stderr; where that is full, nobody reads it."""
    with suppress(OSError):
        print(harmless(text), file=sys.stderr, flush=True)


def write(text: str, end: str = "\n") -> None:
    """Writes to stdout at once: byte for byte, but for what a terminal would obey.

    Raises:
        MeshwenError: it cannot be written, as on a full disk.
    """
    try:
        print(harmless(text) if sys.stdout.isatty() else text, end=end, flush=True)
    except BrokenPipeError:  # Nobody reads any more: no error.
        raise
    except OSError as error:
        raise MeshwenError(f"cannot write to stdout: {error.strerror}") from None


def harmless(text: str) -> str:
    """With control characters, but newlines and tabs, as Python writes them.

    For all that users, checkpoints and models bring and a terminal shows.
    """
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def plain(text: str, style: str = "") -> Text:
    """A text for Rich as it is: no markup, no emoji codes, no control characters in it."""
    return Text(harmless(text).expandtabs(), style=style)


def say(console: Console, text: str, style: str = "") -> None:
    """Prints a text as it is, folded between words; a longer word is left to the terminal."""
    folded = "\n".join(_folded(line, console.width) for line in harmless(text).split("\n"))
    console.print(plain(folded, style), soft_wrap=True)


def _folded(line: str, width: int) -> str:
    return textwrap.fill(
        line,
        max(1, width),
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )


def output_console() -> Console:
    """A console on stdout, as wide as the terminal, or 100 columns in a pipe."""
    width = None if sys.stdout.isatty() else _PIPED_WIDTH
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    console.width = console.width or _PIPED_WIDTH  # As with COLUMNS=0: Rich would print nothing.
    return console


@contextmanager
def working(doing: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Shows what is being done, on a terminal's stderr, while nothing else is printed to it.

    Args:
        doing: says what is being done now; asked four times a second, by another thread.

    Yields:
        A function that ends it before the block does.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    started = time.monotonic()
    with Live(
        console=console,
        transient=True,
        redirect_stdout=False,
        get_renderable=lambda: plain(f"{doing()} ({time.monotonic() - started:.0f} s)", "dim"),
    ) as live:
        yield live.stop


def before_first_token(prefilled: tuple[int, int] | None) -> str:
    """What an engine does until an answer begins, by its `prefilled`."""
    if prefilled is None:
        return "preparing the answer"
    return f"prefilling the prompt, {prefilled[0]} of {prefilled[1]} tokens"


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[..., None]]:
    """Gives a function to report (done, of how many, more to say).

    A bar on a terminal; elsewhere, as in a log, a line every minute.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _report_in_lines(label)
        return
    with Progress(
        *columns, console=console, transient=True, speed_estimate_period=_SPEED_PERIOD
    ) as bar:
        task = bar.add_task(label, total=None)

        def report(done: int, total: int, detail: str = "") -> None:
            description = f"{label}, {detail}" if detail else label
            if bar.tasks[0].total is None:  # What was done before says nothing of the time left.
                bar.reset(task, total=total, completed=done)
            bar.update(task, completed=done, total=total, description=description)

        yield report


def _report_in_lines(label: str) -> Callable[..., None]:
    last = time.monotonic()

    def report(done: int, total: int, detail: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_PERIOD:
            last = time.monotonic()
            note(f"{label}: {done} of {total}" + (f", {detail}" if detail else ""))

    return report


class Meter:
    """Measures answers as they come.

    Attributes:
        completions: the answers that are whole.
        errors: what went wrong with a request, by its number.
    """

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._times: list[float] = []
        self._requests: set[int] = set()
        self.completions: list[Completion] = []
        self.errors: dict[int, str] = {}

    @property
    def count(self) -> int:
        """Tokens that have come."""
        return len(self._times)

    def watch(self, events: Iterable[Event]) -> Iterator[Event]:
        """Passes events on."""
        for event in events:
            if event.token >= 0:  # An error is no token.
                self._times.append(time.perf_counter() - self._started)
            self._requests.add(event.request)
            if event.completion is not None:
                self.completions.append(event.completion)
                if event.completion.error is not None:
                    self.errors[event.request] = event.completion.error
            yield event

    def summary(self) -> str:
        """One line: time to the first token, tokens per second, and what was cached of prompts.

        Of one answer, the rate is that from the second token on: the first two wait for what has
        to be compiled. Of several answers it is that of the whole run.
        """
        count, answers = len(self._times), len(self._requests)
        if not count:
            return "no token"
        first, last = self._times[0], self._times[-1]
        text = f"first token after {first:.2f} s, {count} token{'s' * (count > 1)} in {last:.2f} s"
        if answers > 1:
            text = f"{answers} answers: {text}, {count / last:.1f} tokens/s"
        elif count >= 3:
            rate = (count - 2) / (last - self._times[1])
            text += f"; from the second on {rate:.1f} tokens/s"
        return text + self._cached()

    def _cached(self) -> str:
        """How much of the prompts of whole answers was in the KV cache; "" for nothing."""
        cached = sum(one.cached_tokens for one in self.completions)
        total = sum(len(one.prompt_tokens) for one in self.completions)
        return f"; {cached} of {total} prompt tokens cached" if cached else ""
