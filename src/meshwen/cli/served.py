# SPDX-License-Identifier: Apache-2.0
"""The options of commands that ask a server in place of a model that they load."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshwen.cli.options import MODEL_HELP, declared
from meshwen.common.option_fields import Option
from meshwen.engine.options import EngineOptions
from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    from meshwen.client.server import Server

_KEY_VARIABLE = "MESHWEN_API_KEY"

ModelOrServed = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help=f"{MODEL_HELP} With --url, a model of the server's. Default: demo; with --url, the "
        "server's first.",
        show_default=False,
    ),
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="Ask this server, meshwen's or another's with OpenAI's interface, in place of a model "
        "that is loaded: http://127.0.0.1:8000.",
        show_default=False,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar=_KEY_VARIABLE,
        help="The key that the server asks for.",
        show_default=False,
    ),
]
Timeout = Annotated[
    float,
    declared(Option("Seconds that the server may be silent.", float, least=1), "--timeout"),
]


@dataclass(frozen=True)
class AskedServer:
    """A server that is asked: its address, the key that it wants, and how long it may be silent."""

    url: str
    api_key: str | None
    timeout: float

    def connect(self) -> Server:
        """A client of it."""
        from meshwen.client.server import Server

        return Server(self.url, self.api_key, timeout=self.timeout)


def asked_server(
    url: Url = None, api_key: ApiKey = None, timeout: Timeout = 600.0
) -> AskedServer | None:
    """The server to ask; None: none is. Its parameters are options."""
    return None if url is None else AskedServer(url, api_key, timeout)


def refuse_engine(engine: EngineOptions, default: EngineOptions, **others: Any) -> None:
    """Refuses options that say how a model is loaded, where a server has loaded it.

    Args:
        engine: those of the command.
        default: what they are if nobody gives one.
        others: further options by name, None where they were not given.
    """
    given = [
        one.name
        for one in fields(EngineOptions)
        if getattr(engine, one.name) != getattr(default, one.name)
    ]
    given += [name for name, value in others.items() if value is not None]
    if given:
        flag = given[0].replace("_", "-")
        raise MeshwenError(f"--{flag} is for a model that is loaded: leave it out with --url")
