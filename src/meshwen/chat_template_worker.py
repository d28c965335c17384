# SPDX-License-Identifier: Apache-2.0
"""The process in which a checkpoint's chat template runs; `chat_template.py` starts it.

Run as a script, never imported: it needs nothing but jinja2. It reads one JSON request a line and
writes one JSON reply a line, after an empty first reply. A process is what bounds a template
soundly: the watchdog below is a C thread that ends the process even while one long C call holds the
interpreter, and the memory limit is the operating system's. Neither can be had for one thread of
the caller's process.
"""

import faulthandler
import json
import os
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


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
    room = max_characters
    for piece in compiled(source).generate(variables):
        room -= len(piece)
        if room < 0:
            raise OutputLimitError(f"it writes more than {max_characters} characters")
        pieces.append(piece)
    return "".join(pieces)


def reply_to(request: dict[str, Any]) -> dict[str, str]:
    """Return `{"text": ...}`, or `{"error": ...}` in one short line."""
    try:
        return {
            "text": render(request["template"], request["variables"], request["max_characters"])
        }
    except jinja2.TemplateSyntaxError as error:
        problem = f"line {error.lineno}: {error.message}"
    except (jinja2.TemplateError, OutputLimitError) as error:
        problem = str(error)
    except MemoryError:
        problem = "it needs too much memory"
    except Exception as error:  # a template can raise anything that Python can
        problem = f"{type(error).__name__}: {error}"
    return {"error": " ".join(problem[:500].split())}


def limit_memory(size: int) -> None:
    """Cap this process's address space at `size` bytes where the system can (not on Windows)."""
    try:
        import resource  # absent on Windows
    except ImportError:
        return
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    except (OSError, ValueError):  # macOS may refuse; the time limit still holds
        return


def send(reply: dict[str, str]) -> None:
    """Write one reply line."""
    sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
    sys.stdout.buffer.flush()


def main(max_memory: int) -> None:
    """Say that it runs, then answer requests until standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    limit_memory(max_memory)
    send({})
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin.buffer:
            request = json.loads(line)
            faulthandler.dump_traceback_later(request["seconds"], exit=True, file=nowhere)
            reply = reply_to(request)
            faulthandler.cancel_dump_traceback_later()
            send(reply)


if __name__ == "__main__":
    main(int(sys.argv[1]))
