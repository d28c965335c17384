# SPDX-License-Identifier: Apache-2.0
"""Fields of a dataclass that users set: declared once, for Python and for the command line."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from inspect import cleandoc
from typing import Any, TypeVar

from meshwen.common.arguments import brief, meant, number, truth, whole_number
from meshwen.common.choices import check_choice
from meshwen.errors import MeshwenError

_KEY = "option"
Documented = TypeVar("Documented", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """What may be asked of a field, and what it means.

    Attributes:
        help: what it means, in a sentence or two.
        type: of one value: str, int, float or bool; object: any, which text can name.
        choices: the words that it may be; none: any.
        least: the least that it may be, if a number.
        most: the most.
        many: it is a list of such values.
        parse: of type object, from its name and what was given to the value, or an error.
        secret: no text that is made of the dataclass shows it.
    """

    help: str
    type: type = str
    choices: tuple[str, ...] = ()
    least: int | None = None
    most: int | None = None
    many: bool = False
    parse: Callable[[str, Any], Any] | None = None
    secret: bool = False

    @property
    def range(self) -> str:
        """The numbers allowed: "at least 1"; "" where any is."""
        if self.least is None:
            return ""
        return (
            f"at least {self.least}" if self.most is None else f"from {self.least} to {self.most}"
        )

    def checked(self, name: str, value: Any) -> Any:
        """The value, where it is a text, one of the choices, or a number in the range.

        Args:
            name: what to call it: "max_num_seqs", or a command's "--max-num-seqs".
            value: what was given.

        Raises:
            MeshwenError: it is not.
        """
        if self.choices:
            check_choice(name, value, self.choices)
        elif self.type is str and not isinstance(value, str):
            raise MeshwenError(f"{name} must be text, not {brief(value)}")
        if self.parse is not None:
            return self.parse(name, value)
        if self.type is bool:
            return truth(name, value)
        if self.type not in (int, float):
            return value
        found = whole_number(name, value) if self.type is int else number(name, value)
        if found != found:
            raise MeshwenError(f"{name} must be a number, not NaN")
        too_small = self.least is not None and found < self.least
        if too_small or (self.most is not None and found > self.most):
            raise MeshwenError(f"{name} must be {self.range}, not {found}")
        return found

    def read(self, name: str, text: Any) -> Any:
        """The value that the text of a command line means; a default is none, and is as it is.

        Raises:
            MeshwenError: it means none that is allowed.
        """
        if self.type not in (int, float) or not isinstance(text, str):
            return self.checked(name, text)
        try:
            value = self.type(text)
        except ValueError:
            kind = "a whole number" if self.type is int else "a number"
            raise MeshwenError(f"{name} must be {kind}, not {brief(text)}") from None
        return self.checked(name, value)


def option(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field that users set.

    Args:
        default: its default.
        help: what it means.
        limits: further fields of `Option`.
    """
    one = Option(help, **limits)
    return field(default=default, metadata={_KEY: one}, repr=not one.secret)


def options_of(kind: type) -> dict[str, Option]:
    """The options among a dataclass's fields, by name, in their order."""
    return {f.name: f.metadata[_KEY] for f in fields(kind) if _KEY in f.metadata}


def check_names(what: str, given: Iterable[str], kind: type) -> None:
    """Refuses names that no option of a dataclass has.

    Args:
        what: what an option is called: "sampling parameter".
        given: the names.
        kind: the dataclass.

    Raises:
        MeshwenError: naming an unknown one, what may have been meant, and all that there are.
    """
    known = options_of(kind)
    if unknown := sorted(set(given) - set(known)):
        name = unknown[0]
        raise MeshwenError(
            f"there is no {what} {name!r}{meant(name, known, most=1)}; there are {', '.join(known)}"
        )


def documented(kind: type, heading: str) -> Callable[[Documented], Documented]:
    """Appends the options of a dataclass, with their defaults, to the docstring of what takes them.

    So `help()` shows the text that the command line shows, and nobody writes it twice.
    """
    defaults = {f.name: f.default for f in fields(kind)}
    lines = [
        textwrap.fill(
            f"{name} ({defaults[name]!r}): {one.help}",
            width=96,
            initial_indent="    ",
            subsequent_indent="        ",
            break_on_hyphens=False,
        )
        for name, one in options_of(kind).items()
    ]

    def append(target: Documented) -> Documented:
        target.__doc__ = "\n".join([cleandoc(target.__doc__ or ""), "", f"{heading}:", *lines])
        return target

    return append
