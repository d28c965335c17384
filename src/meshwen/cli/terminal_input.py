# SPDX-License-Identifier: Apache-2.0
"""What a person types to `chat`, turn by turn, by way of prompt_toolkit."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output, create_output

from meshwen.cli.console import note
from meshwen.cli.interrupt import take


def typed_turns(
    commands: Sequence[str],
    settings: Sequence[str],
    terminal: tuple[Input, Output] | None = None,
) -> Iterator[str]:
    """What is typed, until Ctrl-D.

    Enter ends a turn, Alt-Enter a line of one; what is pasted is one turn whatever its lines. The
    arrows bring turns of this conversation back, which nobody else gets to see; Tab completes
    commands, the names of settings and files.

    Args:
        commands: what a turn may begin with, each with its slash.
        settings: names for /set.
        terminal: in place of the process's own.
    """
    screen = sys.stdout if sys.stdout.isatty() else sys.stderr  # Answers may go to a file.
    given, shown = terminal or (None, create_output(screen))
    session: PromptSession[str] = PromptSession(
        "> ",
        input=given,
        output=shown,
        completer=CommandCompleter(commands, settings),
        complete_while_typing=False,
        history=InMemoryHistory(),
        key_bindings=_keys(),
        prompt_continuation="  ",
    )
    while True:
        try:
            with _own_wakeup():
                text = session.prompt(handle_sigint=False)
        except EOFError:
            return
        except KeyboardInterrupt as stop:
            take(stop)
            note("(Ctrl-D or /quit leaves)")
        else:
            yield text


@contextmanager
def _own_wakeup() -> Iterator[None]:
    """Gives the file that signals are written to back: asyncio, which reads keys, takes it."""
    before = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class CommandCompleter(Completer):
    """Completes commands, the names of settings after /set, and files after /save."""

    def __init__(self, commands: Sequence[str], settings: Sequence[str]):
        """Takes the words there are."""
        self._commands, self._settings = commands, settings
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        """What may stand in place of the word before the cursor."""
        before = document.text_before_cursor
        command, space, argument = before.partition(" ")
        if not before.startswith("/"):
            return
        if space and command == "/save":
            yield from self._paths.get_completions(Document(argument), event)
            return
        words = self._settings if space and command == "/set" else self._commands
        typed = argument if space else command
        if space and command != "/set":
            return
        for word in words:
            if word.startswith(typed):
                yield Completion(word, start_position=-len(typed))
