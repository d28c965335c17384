# SPDX-License-Identifier: Apache-2.0
"""The process in which a checkpoint's chat template runs; `chat_template.py` starts it.

It needs nothing but jinja2.
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from meshwen.common.contained_worker import Reply, problem, serve


class OutputLimitError(Exception):
    """The template wrote more characters than it may."""


class GenerationTag(Extension):
    """`{% generation %}` marks what the assistant wrote; rendering shows its body unchanged."""

    tags = {"generation"}  # noqa: RUF012 - the name and type are jinja2's

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the tag's body as a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def raise_exception(message: str) -> NoReturn:
    """Let a template refuse its input, as transformers does."""
    raise jinja2.TemplateError(message)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as transformers does: jinja2's own filter would escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def strftime_now(layout: str) -> str:
    """Return the local time in a `strftime` layout."""
    return datetime.now().strftime(layout)


@lru_cache(maxsize=4)
def compiled(source: str) -> jinja2.Template:
    """Compile a template in the environment that transformers gives it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(source)


def render(source: str, variables: dict[str, Any], max_characters: int) -> str:
    """Render a template, piece by piece, so that its output is bounded."""
    pieces: list[str] = []
    left = max_characters
    for piece in compiled(source).generate(variables):
        left -= len(piece)
        if left < 0:
            raise OutputLimitError(f"it writes more than {max_characters} characters")
        pieces.append(piece)
    return "".join(pieces)


def reply_to(request: dict[str, Any]) -> Reply:
    """Return `{"text": ...}`, or `{"error": ...}` where the template refuses or is faulty."""
    try:
        return {
            "text": render(request["template"], request["variables"], request["max_characters"])
        }
    except jinja2.TemplateSyntaxError as error:
        return problem(f"line {error.lineno}: {error.message}")
    except (jinja2.TemplateError, OutputLimitError) as error:
        return problem(str(error))


if __name__ == "__main__":
    serve(reply_to)
