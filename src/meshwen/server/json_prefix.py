# SPDX-License-Identifier: Apache-2.0
"""Whether text that comes character by character is the beginning of JSON."""

from __future__ import annotations

import json

SPACE = " \t\n\r"


class JsonPrefix:
    """A JSON value as far as it has come.

    A raw control character within a string, which models write and JSON does not have, is taken for
    its escape. An escape of half a character is refused, as nobody could print it.

    Attributes:
        state: what may come next; "after" a value, and "value", "name", "next name", "colon" before
            what these say; others are within a value.
        depth: lists and objects that are open.
    """

    def __init__(self) -> None:
        self.state = "value"
        self._open: list[str] = []  # How each of them ends.
        self._naming = False  # The string is a member's name.

    @property
    def depth(self) -> int:
        """How many lists and objects are open."""
        return len(self._open)

    def push(self, char: str) -> str | None:
        """Takes a character; returns it as JSON has it, None where it cannot come: then stop."""
        if self.state == "string":
            return self._in_string(char)
        if self.state in _NUMBERS and char not in _STEPS[self.state]:
            self.state = "after"
        if self.state in _BETWEEN and char in SPACE:
            return char
        found = _STEPS[self.state].get(char) or self._structure(char)
        if found is None:
            return None
        if char == '"' and self.state in _BETWEEN:
            self._naming = self.state in ("name", "next name")
        self.state = found
        return char

    def _in_string(self, char: str) -> str:
        if char == '"':
            self.state = "colon" if self._naming else "after"
        elif char == "\\":
            self.state = "escape"
        return char if char >= " " else json.dumps(char)[1:-1]

    def _structure(self, char: str) -> str | None:
        """The state after what begins, parts or ends lists and objects; None: it does not."""
        within = self._open[-1:]
        if self.state in ("value", "item") and char in "{[":
            self._open.append("}" if char == "{" else "]")
            return "name" if char == "{" else "item"
        if [char] == within and self.state in ("after", "name" if char == "}" else "item"):
            self._open.pop()
            return "after"
        if self.state == "after" and within and char == ",":
            return "next name" if within == ["}"] else "value"
        return None


def _to(state: str, chars: str) -> dict[str, str]:
    return dict.fromkeys(chars, state)


_DIGITS, _HEX = "0123456789", "0123456789abcdefABCDEF"
_POINT, _POWER = {".": "point"}, _to("power", "eE")
_VALUE = {'"': "string", "-": "minus", "0": "zero", "t": "rue", "f": "alse", "n": "ull"}
_VALUE |= _to("whole", _DIGITS[1:])
# By state and character, the next state. Within a word the state is what is left of it.
_STEPS: dict[str, dict[str, str]] = {
    "value": _VALUE,
    "item": _VALUE,
    "name": {'"': "string"},
    "next name": {'"': "string"},
    "colon": {":": "value"},
    "after": {},
    "escape": _to("string", '"\\/bfnrt') | {"u": "4 digits"},
    "4 digits": _to("3 digits", _HEX) | _to("D", "dD"),
    "3 digits": _to("2 digits", _HEX),
    "2 digits": _to("1 digit", _HEX),
    "1 digit": _to("string", _HEX),
    # \uD800 to \uDBFF is half of a character; the other half must follow: \uDC00 to \uDFFF.
    "D": _to("2 digits", "01234567") | _to("half's 2 digits", "89abAB"),
    "half's 2 digits": _to("half's 1 digit", _HEX),
    "half's 1 digit": _to("other half", _HEX),
    "other half": {"\\": "its u"},
    "its u": {"u": "its D"},
    "its D": _to("its C", "dD"),
    "its C": _to("2 digits", "cdefCDEF"),
    "minus": {"0": "zero"} | _to("whole", _DIGITS[1:]),
    "zero": _POINT | _POWER,
    "whole": _to("whole", _DIGITS) | _POINT | _POWER,
    "point": _to("fraction", _DIGITS),
    "fraction": _to("fraction", _DIGITS) | _POWER,
    "power": _to("signed", "+-") | _to("exponent", _DIGITS),
    "signed": _to("exponent", _DIGITS),
    "exponent": _to("exponent", _DIGITS),
    **{
        word[at:]: {word[at]: word[at + 1 :] or "after"}
        for word in ("rue", "alse", "ull")
        for at in range(len(word))
    },
}
_NUMBERS = {"zero", "whole", "fraction", "exponent"}  # Where a number may end.
_BETWEEN = {"value", "item", "name", "next name", "colon", "after"}
