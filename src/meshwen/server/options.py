# SPDX-License-Identifier: Apache-2.0
"""`ServerOptions`: how a model is served."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from meshwen.common.choices import (
    REASONING_PARSERS,
    TOOL_CALL_PARSERS,
    ReasoningParser,
    ToolCallParser,
)
from meshwen.common.option_fields import documented, option, options_of
from meshwen.common.units import bytes_number
from meshwen.errors import MeshwenError

KEY_VARIABLE = "MESHWEN_API_KEY"
_MOST_KEY_CHARACTERS = 1024


def _body_size(name: str, value: Any) -> int:
    return bytes_number(name, int(value) if str(value).isdecimal() else value)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a model is served; `meshwen serve` has an option for each.

    Raises MeshwenError at construction when a value is impossible.
    """

    host: str = option("127.0.0.1", "Address to listen at; 0.0.0.0: every network.")
    port: int = option(8000, "TCP port; 0: any that is free.", type=int, least=0, most=65535)
    uds: str | None = option(None, "Listen at this Unix socket, and at no address.")
    ssl_certfile: str | None = option(
        None, "TLS: file of the certificate, and of those that vouch for it."
    )
    ssl_keyfile: str | None = option(
        None, "TLS: file of the certificate's private key. Default: it is in --ssl-certfile."
    )
    api_key: tuple[str, ...] = option(
        (),
        "Key that requests must have. Others may read it in the list of processes: "
        f"--api-key-file, or the variable {KEY_VARIABLE}, is better.",
        many=True,
        secret=True,
    )
    api_key_file: str | None = option(None, "File with a key on each line.")
    served_model_name: tuple[str, ...] = option(
        (),
        "Name of the model for clients, the first in answers. Default: that of --model.",
        many=True,
    )
    max_queue: int = option(
        1024,
        "Answers that may wait, beyond the --max-num-seqs that run; requests for more are "
        "refused with 503.",
        type=int,
        least=0,
    )
    request_timeout: float = option(
        0.0, "Seconds that a request may take; 0: any time.", type=float, least=0
    )
    shutdown_timeout: float = option(
        30.0,
        "Seconds that requests have to finish after SIGTERM or Ctrl-C; a second one stops at once.",
        type=float,
        least=0,
    )
    max_body_size: int | str = option(
        "4MiB", "Most bytes of a request's body.", type=object, parse=_body_size
    )
    allowed_origins: tuple[str, ...] = option(
        (),
        "Origin of web pages that may call the server (CORS), such as https://example.org; *: all.",
        many=True,
    )
    root_path: str = option("", "Path under which a proxy serves it, such as /llm.")
    warmup: bool = option(
        True, "Compile the usual steps before /health says that it is ready.", type=bool
    )
    access_log: bool = option(True, "Log a line for each request, without what it says.", type=bool)
    tool_call_parser: ToolCallParser = option(
        "qwen2_5",
        "How the model writes tool calls. qwen2_5: as <tool_call>{JSON}</tool_call>. "
        "qwen_coder_fenced: so, or as JSON that is fenced, within <tools>, or begins the answer, "
        "as Qwen2.5-Coder may. none: nothing is a call.",
        choices=TOOL_CALL_PARSERS,
    )
    reasoning_parser: ReasoningParser = option(
        "auto",
        "How the model writes what it thinks before it answers. think: as <think>...</think>. "
        "none: not apart. auto: think, where the chat template has </think>.",
        choices=REASONING_PARSERS,
    )
    stream_keep_alive: float = option(
        10.0,
        "Seconds after which a stream that has nothing new sends a comment, so that proxies keep "
        "the connection; 0: never.",
        type=float,
        least=0,
    )
    enable_prompt_tokens_details: bool = option(
        False,
        "Say how many of a prompt's tokens were in the KV cache; that depends on earlier requests.",
        type=bool,
    )

    def __post_init__(self) -> None:
        """Checks the values, and makes tuples of lists."""
        options = options_of(ServerOptions)
        for f in fields(self):
            value, one = getattr(self, f.name), options[f.name]
            if one.many:
                value = tuple(one.checked(f.name, item) for item in value)
            elif value is not None or f.default is not None:
                value = one.checked(f.name, value)
            object.__setattr__(self, f.name, value)
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise MeshwenError("ssl_keyfile needs its certificate: give --ssl-certfile too")

    def api_keys(self, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
        """All keys: those given, the file's, and the environment's.

        Raises:
            MeshwenError: the file cannot be read or has no key, or a key cannot be sent.
        """
        found = [("api_key", key) for key in self.api_key]
        if environment.get(KEY_VARIABLE):
            found.append((KEY_VARIABLE, environment[KEY_VARIABLE]))
        if self.api_key_file is not None:
            lines = _lines(self.api_key_file)
            found += [(f"a key in {self.api_key_file}", key) for key in lines]
        for where, key in found:
            if not (key.isascii() and key.isprintable() and " " not in key and key):
                raise MeshwenError(f"{where} must be visible ASCII characters, without blanks")
            if len(key) > _MOST_KEY_CHARACTERS:
                raise MeshwenError(f"{where} must have at most {_MOST_KEY_CHARACTERS} characters")
        return tuple(dict.fromkeys(key for _, key in found))


def _lines(name: str) -> list[str]:
    try:
        text = Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise MeshwenError(f"api_key_file {name} cannot be read: {error.strerror}") from None
    except ValueError:
        raise MeshwenError(f"api_key_file {name} must be UTF-8 text") from None
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:  # An empty file must not open the server to all.
        raise MeshwenError(f"api_key_file {name} must have a key on each line, and has none")
    return keys


documented(ServerOptions, "Attributes, with their defaults")(ServerOptions)
