# SPDX-License-Identifier: Apache-2.0
"""Whether the server takes requests: not while the model is loaded, and not when it is to end."""

from __future__ import annotations

import asyncio

from starlette.responses import JSONResponse

from meshwen.server.asgi import App, Receive, Scope, Send, error_response, route_path
from meshwen.server.errors import ApiError

_HEALTH = ("/health", "/ping")


class Gate:
    """An ASGI application before another, which comes when the model is loaded.

    Attributes:
        app: what answers; None: it is not there yet.
        draining: no further requests are taken; those that run go on.
        loading: what is done until the application is there.
    """

    def __init__(self) -> None:
        self.app: App | None = None
        self.draining = False
        self.loading = "the model is being loaded"
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or says that it comes too soon or too late."""
        if scope["type"] != "http":
            return None
        closed = self._closed(scope)
        if self.app is None or closed is not None:
            assert closed is not None
            return await closed(scope, receive, send)
        self._running += 1
        self._idle.clear()
        try:
            return await self.app(scope, receive, send)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def idle(self) -> None:
        """Returns when no request runs."""
        await self._idle.wait()

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return self._running

    def _closed(self, scope: Scope) -> App | None:
        """What answers in the application's place; None: nothing does."""
        path = route_path(scope)
        if self.app is None:
            state, why, seconds = "loading", f"{self.loading}; try again soon", "5"
        elif self.draining and (path in _HEALTH or scope["method"] not in ("GET", "HEAD")):
            state, why, seconds = "draining", "the server is shutting down", "5"
        else:
            return None
        headers = {"Retry-After": seconds, "Connection": "close"}
        if path in _HEALTH:
            return JSONResponse({"status": state}, 503, headers)
        return error_response(path, ApiError(503, why, code=state, headers=headers))
