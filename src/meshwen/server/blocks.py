# SPDX-License-Identifier: Apache-2.0
"""An answer as a list of blocks, for protocols whose answers are such lists."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import from_json

from meshwen.server.generation import Delta
from meshwen.server.parsing import ToolCallDelta

Kind = Literal["reasoning", "content", "call"]
# What happens to a block: it begins, gets more text, ends.
Change = Literal["begins", "grows", "ends"]


@dataclass
class Block:
    """Reasoning, content or a tool call.

    Attributes:
        kind: which of them.
        number: its place in the answer, from 0 on.
        text: of the reasoning or content, or of the call's arguments, as far as it has come.
        id: the call's.
        name: of the function that is called.
    """

    kind: Kind
    number: int
    text: str = ""
    id: str = ""
    name: str = ""

    @property
    def arguments(self) -> dict[str, Any]:
        """The call's arguments; those that broke off as far as they go, as clients read a stream.

        What no client could read, such as a number beyond all bounds, is under the name "text".
        """
        try:
            found = from_json(self.text or "{}", allow_partial="trailing-strings")
            json.dumps(found, allow_nan=False)
        except ValueError:
            return {"text": self.text}
        return found if isinstance(found, dict) else {"text": self.text}


class Blocks:
    """The blocks of one answer as they come: each of them ends before the next begins.

    Attributes:
        all: those that have begun.
    """

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None

    def add(self, delta: Delta) -> Iterator[tuple[Change, Block, str]]:
        """What a delta does to the blocks, in order: the change, the block, and its new text."""
        calls = list(delta.tool_calls)
        while calls and calls[0].name is None:  # Content comes after the call that is open.
            yield from self._grow("call", calls.pop(0).arguments)
        if delta.reasoning:
            yield from self._grow("reasoning", delta.reasoning)
        if delta.content:
            yield from self._grow("content", delta.content)
        for call in calls:
            if call.name is not None:
                yield from self._begin("call", call)
            else:
                yield from self._grow("call", call.arguments)

    def end(self) -> Iterator[tuple[Change, Block, str]]:
        """What the end of the answer does to the blocks."""
        if self._open is not None:
            yield "ends", self._open, ""
            self._open = None

    def _begin(
        self, kind: Kind, call: ToolCallDelta | None = None
    ) -> Iterator[tuple[Change, Block, str]]:
        yield from self.end()
        self._open = Block(kind, len(self.all))
        if call is not None:
            self._open.id, self._open.name = call.id, call.name or ""
        self.all.append(self._open)
        yield "begins", self._open, ""

    def _grow(self, kind: Kind, text: str) -> Iterator[tuple[Change, Block, str]]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(kind)
        assert self._open is not None
        self._open.text += text
        yield "grows", self._open, text
