# SPDX-License-Identifier: Apache-2.0
"""The outermost layer: ids of requests, a line in the log for each, and defects as 500."""

from __future__ import annotations

import logging
import re
import secrets
import time

from meshwen.server.asgi import (
    App,
    Message,
    Receive,
    Scope,
    Send,
    error_response,
    header,
    route_path,
)
from meshwen.server.errors import ApiError

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_QUIET = ("/health", "/ping", "/metrics", "/page/state")  # Asked again and again.
_LONGEST_PATH = 200
_GONE = 499  # The status in the log where the client went away before it was answered.


class RequestLog:
    """Gives each request an id, and logs its method, path, status and time: nothing that it says.

    Args:
        app: what answers.
        enabled: whether lines are written.
    """

    def __init__(self, app: App, enabled: bool = True):
        self._app, self._enabled = app, enabled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = header(scope, b"x-request-id") or b""
        number = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12).encode()
        started, status, done = time.monotonic(), _GONE, False

        async def note(message: Message) -> None:
            nonlocal status, done
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", number)]
            elif message["type"] == "http.response.body":
                done = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception:
            if status != _GONE:  # The server closes the connection, and logs why.
                raise
            logger.exception("request %s failed", number.decode())
            error = ApiError(500, "the server failed; its log says why", code="internal_error")
            await error_response(route_path(scope), error)(scope, receive, note)
        finally:
            self._write(scope, status if done else _GONE, time.monotonic() - started, number)
        return None

    def _write(self, scope: Scope, status: int, seconds: float, number: bytes) -> None:
        path = route_path(scope)
        if self._enabled and not (path in _QUIET and status < 400):
            client = scope.get("client")
            logger.info(
                '%s "%s %s" %d %.3f s %s',
                client[0] if client else "-",
                scope["method"],
                ascii(path[:_LONGEST_PATH])[1:-1],
                status,
                seconds,
                number.decode(),
            )
