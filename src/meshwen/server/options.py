# SPDX-License-Identifier: Apache-2.0
"""`ServerOptions`: how a model is served."""

from __future__ import annotations

from dataclasses import dataclass

from meshwen.common.choices import (
    REASONING_PARSERS,
    TOOL_CALL_PARSERS,
    ReasoningParser,
    ToolCallParser,
)
from meshwen.common.option_fields import documented, option


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a model is served; `meshwen serve` has an option for each."""

    host: str = option("127.0.0.1", "Address to listen at; 0.0.0.0: every network.")
    port: int = option(8000, "TCP port; 0: any that is free.", type=int, least=0, most=65535)
    served_model_name: tuple[str, ...] = option(
        (),
        "Name of the model for clients, the first in answers. Default: that of --model.",
        many=True,
    )
    max_queue: int = option(
        1024, "Requests that may wait; further ones are refused with 503.", type=int, least=0
    )
    tool_call_parser: ToolCallParser = option(
        "qwen2_5",
        "How the model writes tool calls. qwen2_5: as <tool_call>{JSON}</tool_call>. "
        "qwen_coder_fenced: so, or as a fenced block of JSON, as Qwen2.5-Coder may. none: nothing "
        "is a call.",
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


documented(ServerOptions, "Attributes, with their defaults")(ServerOptions)
