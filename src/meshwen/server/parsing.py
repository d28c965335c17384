# SPDX-License-Identifier: Apache-2.0
"""What parses the text of an answer as it comes: into content, reasoning and tool calls.

Every character of the text comes out once: as content, as reasoning, or within a call. What marks
these (tags, and the newlines beside them) comes out only where it turns out to mark nothing: then
it is content. How the text is cut into pieces does not change what comes out of it in the end.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ToolCallDelta:
    """The beginning of a tool call, or more of its arguments.

    Attributes:
        index: which of the answer's calls, from 0 on.
        id: the call's, the same in all of its deltas; protocols send it with the name alone.
        name: the function's, in a call's first delta, whose arguments are empty; None in others.
        arguments: a piece of the arguments' JSON text; all pieces together are an object, unless
            the answer broke off within them.
    """

    index: int
    id: str
    name: str | None
    arguments: str


@dataclass(frozen=True)
class Parsed:
    """What came out of a piece of text; reasoning came before content, content before calls."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def __bool__(self) -> bool:
        """Whether anything came out."""
        return bool(self.content or self.reasoning or self.tool_calls)


class OutputParser(Protocol):
    """Parses the text of one answer."""

    @property
    def called_tools(self) -> bool:
        """Whether a tool call has begun."""

    def push(self, text: str) -> Parsed:
        """Takes more of the text; returns what is certain by now and was not returned before."""

    def finish(self) -> Parsed:
        """Ends the text; returns the rest, in which no call begins."""


class PlainText:
    """Takes all text as content."""

    called_tools = False

    def push(self, text: str) -> Parsed:
        """Takes more of the text."""
        return Parsed(content=text)

    def finish(self) -> Parsed:
        """Ends the text."""
        return Parsed()


def new_id(prefix: str) -> str:
    """An id that nobody can guess: "call_" and 24 hexadecimal digits."""
    return prefix + secrets.token_hex(12)


def possible_start(text: str, marks: tuple[str, ...]) -> int:
    """Where the longest end of a text begins that one of the marks begins with; or its length."""
    longest = min(len(text), max(map(len, marks), default=1) - 1)
    for at in range(len(text) - longest, len(text)):
        if any(mark.startswith(text[at:]) for mark in marks):
            return at
    return len(text)
