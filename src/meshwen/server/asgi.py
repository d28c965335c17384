# SPDX-License-Identifier: Apache-2.0
"""What the layers round the application share: ASGI's types, headers, and errors as responses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse, Response

from meshwen.server.errors import ApiError

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def header(scope: Scope, name: bytes) -> bytes | None:
    """A request's header; the first where there are several, None where there is none."""
    return next((value for key, value in scope["headers"] if key == name), None)


def route_path(scope: Scope) -> str:
    """A request's path, without what a proxy serves the server under."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] or "/" if root and f"{path}/".startswith(f"{root}/") else path


def error_response(path: str, error: ApiError) -> Response:
    """An error in the shape that the clients of a path know: OpenAI's or Anthropic's."""
    body = error.anthropic() if path.startswith("/v1/messages") else error.openai()
    return JSONResponse(body, error.status, error.headers)
