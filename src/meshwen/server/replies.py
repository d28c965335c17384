# SPDX-License-Identifier: Apache-2.0
"""What all of OpenAI's responses have around their choices: id, time, model, number of tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.responses import Response

from meshwen.engine.request import Request
from meshwen.server.generation import Delta
from meshwen.server.parsing import new_id
from meshwen.server.serving import Serving


def to_json(body: Any) -> str:
    """JSON text: the same for the same value."""
    return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def json_response(body: Any) -> Response:
    """A response of one JSON value."""
    return Response(to_json(body), media_type="application/json")


class Usage:
    """Counts the tokens of one HTTP request.

    Args:
        requests: the engine's.
        with_details: whether to say how many of the prompt's tokens were in the KV cache.
    """

    def __init__(self, requests: Iterable[Request], with_details: bool):
        self._prompt = sum(len(one.prompt_tokens) for one in requests)
        self._answer = self._cached = 0
        self._with_details = with_details

    def add(self, deltas: Iterable[Delta]) -> None:
        """Counts a step's tokens."""
        for delta in deltas:
            self._answer += not delta.dropped
            done = delta.completion
            if done is not None and done.choice == 0:
                self._cached += done.cached_tokens

    def body(self) -> dict[str, Any]:
        """The number of tokens so far."""
        found: dict[str, Any] = {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._answer,
            "total_tokens": self._prompt + self._answer,
        }
        if self._with_details:
            found["prompt_tokens_details"] = {"cached_tokens": self._cached}
        return found


class Envelope:
    """What is alike in a response, or in all chunks of a stream.

    Args:
        serving: the model.
        prefix: of the id: "cmpl-".
        kind: the response's `object`.
        requests: the engine's.

    Attributes:
        id: the response's.
    """

    def __init__(self, serving: Serving, prefix: str, kind: str, requests: Sequence[Request]):
        self.id = new_id(prefix)
        self._head = {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": serving.names[0],
        }
        self._fingerprint = serving.fingerprint
        self.usage = Usage(requests, serving.options.enable_prompt_tokens_details)

    def body(self, choices: Sequence[Any], **further: Any) -> dict[str, Any]:
        """A response, or a chunk of one, with further fields at its end."""
        return {
            **self._head,
            "choices": choices,
            "system_fingerprint": self._fingerprint,
            **further,
        }
