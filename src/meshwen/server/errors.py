# SPDX-License-Identifier: Apache-2.0
"""What a client is told when a request cannot be answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LONGEST_MESSAGE, _LONGEST_PARAM = 900, 200  # characters


class ApiError(Exception):
    """A request that is refused, or failed.

    Args:
        status: the HTTP status.
        message: what was wrong, where, and what to do; cut and made one line, since it may quote
            what a client sent.
        param: the field that was wrong, as a path: "messages[0].content".
        code: a word for programs: "context_length_exceeded".
        kind: OpenAI's `type`; None: the one that goes with the status.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        self.status, self.message = status, _one_line(message, _LONGEST_MESSAGE)
        super().__init__(self.message)
        self.param, self.code = param and _one_line(param, _LONGEST_PARAM), code
        self.kind = kind or _KINDS.get(
            status, "invalid_request_error" if status < 500 else "server_error"
        )
        self.headers = dict(headers or {})

    def openai(self) -> dict[str, Any]:
        """The body in OpenAI's shape."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def anthropic(self) -> dict[str, Any]:
        """The body in Anthropic's shape."""
        kind = _ANTHROPIC_KINDS.get(
            self.status, "invalid_request_error" if self.status < 500 else "api_error"
        )
        error: dict[str, Any] = {"type": kind, "message": self.message}
        if self.code is not None:
            error["details"] = {"error_code": self.code}
        return {"type": "error", "error": error}


def _one_line(text: str, longest: int) -> str:
    """The text without what cannot be printed, and not longer."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: longest + 1])
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


_KINDS = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
