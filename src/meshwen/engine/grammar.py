# SPDX-License-Identifier: Apache-2.0
"""Grammars for `SamplingParams.grammar`, made of what people have: a JSON schema, a regex, a list.

A grammar is text in llguidance's dialect of Lark; an answer is held to it token by token (see
`meshwen.engine.compiled_grammars`). Making the text checks its size; compiling it, all the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meshwen.common.arguments import brief
from meshwen.common.extras import how_to_install
from meshwen.errors import MeshwenError

LONGEST_GRAMMAR = 1 << 20  # characters
_LONGEST_REGEX = _LONGEST_NOTATION = 1 << 16
_MOST_CHOICES = 4096
_DEEPEST = 64  # levels of a JSON schema

# What JSON has between its parts: nothing, a space, or a new line with an indent. With a bound, an
# answer cannot be endless blanks.
_WHITESPACE = r"[ ]|\n([ ]{0,24}|\t{0,8})"


class GrammarError(MeshwenError):
    """A grammar that no answer can be held to.

    Args:
        reason: why not.
    """

    def __init__(self, reason: str):
        super().__init__(f"grammar: {reason}")
        self.reason = reason


def json_schema_grammar(schema: Mapping[str, Any] | bool | str) -> str:
    """JSON that follows a schema (draft 2020-12), its properties in the order of the schema.

    Args:
        schema: the schema, or its text.

    Raises:
        GrammarError: it is none, or too deep or large. What it says that cannot be enforced is
            found when it is compiled.
    """
    return f"start: {json_rule(schema)}"


def json_object_grammar() -> str:
    """Any JSON object."""
    return json_schema_grammar({"type": "object"})


def regex_grammar(pattern: str) -> str:
    """Text that a regular expression matches as a whole, in the syntax of Rust's crate `regex`.

    Raises:
        GrammarError: it is too long, or no text.
    """
    _check_text("a regex", pattern, _LONGEST_REGEX)
    return f"start: /{llguidance().regex_to_lark(pattern)}/"


def choice_grammar(choices: Sequence[str]) -> str:
    """One of some texts.

    Raises:
        GrammarError: there are none, too many, or one is no text.
    """
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise GrammarError(f"choices must be a list of texts, not {brief(choices)}")
    if len(choices) > _MOST_CHOICES:
        raise GrammarError(f"there are {len(choices)} choices, and may be {_MOST_CHOICES}")
    return f"start: {' | '.join(literal(one) for one in choices)}"


def lark_grammar(text: str) -> str:
    """A grammar in Lark's notation, or in llama.cpp's GBNF (a kind of EBNF).

    Raises:
        GrammarError: it is too long, or neither.
    """
    _check_text("a grammar", text, _LONGEST_NOTATION)
    llguidance()
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(text)
    except Exception as error:  # Whatever its reader stumbles over, as over deep brackets.
        raise GrammarError(f"it is no GBNF: {' '.join(str(error).split())[:200]}") from None


def literal(text: str) -> str:
    """A text as a grammar's rules have it.

    Raises:
        GrammarError: it is no text, or not valid Unicode.
    """
    _check_text("a choice", text, LONGEST_GRAMMAR)
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Mapping[str, Any] | bool | str) -> str:
    """What stands in a grammar's rules for JSON that follows a schema: see `json_schema_grammar`.

    References within the schema, `#/$defs/...`, are to itself.
    """
    if isinstance(schema, str):
        _check_text("a JSON schema", schema, LONGEST_GRAMMAR)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"the JSON schema is no JSON: {error}") from None
    if not isinstance(schema, Mapping | bool):
        raise GrammarError(f"a JSON schema must be an object, not {brief(schema)}")
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    _check_depth(schema)
    # Its own settings could have what cannot be enforced be ignored.
    own = {"whitespace_pattern": _WHITESPACE}
    try:
        text = json.dumps({**schema, "x-guidance": own}, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GrammarError(f"the JSON schema is no JSON: {error}") from None
    _check_text("a JSON schema", text, LONGEST_GRAMMAR)
    return f"%json {text}"


def _check_text(what: str, text: str, most: int) -> None:
    if not isinstance(text, str):
        raise GrammarError(f"{what} must be text, not {brief(text)}")
    if len(text) > most:
        raise GrammarError(f"{what} may have {most} characters, not {len(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GrammarError(f"{what} is not valid Unicode: {error}") from None


def _check_depth(schema: Any) -> None:
    """Refuses levels that a reader of the schema might have no stack for."""
    level: Iterable[Any] = [schema]
    for _ in range(_DEEPEST):
        level = [
            inner
            for one in level
            if isinstance(one, Mapping | list | tuple)
            for inner in (one.values() if isinstance(one, Mapping) else one)
        ]
    if level:
        raise GrammarError(f"a JSON schema may have {_DEEPEST} levels")


def llguidance() -> Any:
    """The library, which is imported where a grammar is used.

    Raises:
        MeshwenError: it is not installed.
    """
    try:
        import llguidance
    except ImportError:
        raise MeshwenError(
            f"grammars need the package llguidance: {how_to_install('serve')}"
        ) from None
    return llguidance
