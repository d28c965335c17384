# SPDX-License-Identifier: Apache-2.0
"""The text of an answer as its tokens come: whole characters, and stop strings that end it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from meshwen.tokenizer.tokenizer import Tokenizer


class AnswerText:
    """The text of one answer.

    Args:
        tokenizer: turns tokens into text; None leaves the text empty.
        stop: strings that end the answer.
        include_stop: the one that ends it is part of the text.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, stop: Sequence[str], include_stop: bool = False
    ):
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream_decoder() if tokenizer else None
        self._text = StopText(stop, include_stop)

    @property
    def shown(self) -> str:
        """All text given out so far."""
        return self._text.shown

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._text.stopped

    @property
    def stop_string(self) -> str | None:
        """The stop string that has come."""
        return self._text.stop_string

    def push(self, token: int) -> str:
        """Adds a token; returns the text that can be shown now."""
        if not (self._tokenizer and self._decoder):
            return ""
        return self._text.push(self._decoder.push(token), self._tokenizer.special_text(token))

    def finish(self) -> str:
        """Ends the answer; returns the text that was held back."""
        rest = self._text.push(self._decoder.finish()) if self._decoder else ""
        return rest + self._text.finish()


class StopText:
    """Text that ends at the first stop string, and never shows a part of one: all of it or none.

    Special tokens are no part of the text, but stop strings are found in what is written with them.

    Attributes:
        shown: all text given out so far.
        stop_string: the stop string that has come, after which nothing is shown; None: none has.
    """

    def __init__(self, stop: Sequence[str], include: bool = False):
        self.shown = ""
        self.stop_string: str | None = None
        self._stop, self._include = tuple(stop), include
        self._held: deque[tuple[str, bool]] = deque()  # Pieces, and whether each is to be shown.

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self.stop_string is not None

    def push(self, text: str, special: str = "") -> str:
        """Adds text, then a special token as it is written; returns what can be shown now."""
        if self.stopped:
            return ""
        self._held += [piece for piece in ((text, True), (special, False)) if piece[0]]
        written = "".join(piece for piece, _ in self._held)
        found = {s: at for s in self._stop if (at := written.find(s)) >= 0}
        if found:
            self.stop_string = min(found, key=found.__getitem__)
            shown = self._show(found[self.stop_string])
            end = self.stop_string if self._include else ""
            self.shown += end
            return shown + end
        return self._show(len(written) - self._possible_stop(written))

    def finish(self) -> str:
        """Returns what was held back because it might have begun a stop string."""
        return "" if self.stopped else self._show(sum(len(piece) for piece, _ in self._held))

    def _show(self, length: int) -> str:
        """Releases so many of the characters held; returns those of them that are text."""
        text = ""
        while length:
            piece, is_text = self._held.popleft()
            released, rest = piece[:length], piece[length:]
            if rest:
                self._held.appendleft((rest, is_text))
            text += released if is_text else ""
            length -= len(released)
        self.shown += text
        return text

    def _possible_stop(self, written: str) -> int:
        """Length of the longest end of what is written that begins a stop string."""
        longest = min(len(written), max((len(s) - 1 for s in self._stop), default=0))
        for length in range(longest, 0, -1):
            if any(s.startswith(written[-length:]) for s in self._stop):
                return length
        return 0
