# SPDX-License-Identifier: Apache-2.0
"""What is refused before any handler sees a request: no key, too much, or no strict JSON.

A body is read whole and checked here, so that handlers get JSON in which every reader finds the
same: UTF-8, finite numbers, no key with two values, no halves of characters, not too deep.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
from collections.abc import Iterable

from meshwen.common.json_files import parse_json
from meshwen.errors import MeshwenError
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

_MOST_HEADERS, _MOST_HEADER_BYTES = 100, 32 << 10
_BODY_SECONDS = 60.0
# Free of keys: what load balancers ask, and the page, which has a field for one.
_FREE = re.compile(r"/|/health|/ping|/page/(?!state$)[^/]+")
_MAYBE_NOT_FINITE = re.compile(rb"NaN|Infinity|[eE]\+?\d\d|\d{300}")


class HttpGuard:
    """Refuses requests by their headers and bodies alone.

    Args:
        app: what gets the others.
        api_keys: one of them must be given; none: nobody is asked for one.
        max_body_size: in bytes.
    """

    def __init__(self, app: App, api_keys: Iterable[str], max_body_size: int):
        self._app, self._max_body = app, max_body_size
        self._keys = [_digest(key.encode()) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or passes it on with its body."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            self._check_headers(scope)
            if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                receive = await self._checked_body(scope, receive)
        except ApiError as error:
            return await error_response(route_path(scope), error)(scope, receive, send)
        except _GoneError:
            return None
        return await self._app(scope, receive, send)

    def _check_headers(self, scope: Scope) -> None:
        headers = scope["headers"]
        if len(headers) > _MOST_HEADERS:
            raise ApiError(431, f"the request has more than {_MOST_HEADERS} headers")
        if sum(len(name) + len(value) for name, value in headers) > _MOST_HEADER_BYTES:
            raise ApiError(431, f"the headers have more than {_MOST_HEADER_BYTES} bytes")
        free = scope["method"] == "OPTIONS" or _FREE.fullmatch(route_path(scope))
        if self._keys and not free and not self._has_key(scope):
            raise ApiError(
                401,
                "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _has_key(self, scope: Scope) -> bool:
        """Compares what is given with every key, in a time that says nothing of either."""
        scheme, _, token = (header(scope, b"authorization") or b"").partition(b" ")
        given = [header(scope, b"x-api-key") or b""]
        if scheme.lower() == b"bearer":
            given.append(token.strip())
        found = [hmac.compare_digest(_digest(one), key) for one in given for key in self._keys]
        return any(found)

    async def _checked_body(self, scope: Scope, receive: Receive) -> Receive:
        """A `receive` that gives the whole body, then tells of the client's end."""
        encoding = header(scope, b"content-encoding") or b"identity"
        if encoding.lower() != b"identity":
            raise ApiError(415, "the body must be sent without a Content-Encoding")
        try:
            body = await asyncio.wait_for(self._body(scope, receive), _BODY_SECONDS)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not come within {_BODY_SECONDS:g} s", headers=_CLOSE
            ) from None
        if body:
            kind = (header(scope, b"content-type") or b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                raise ApiError(415, "the body must be JSON, with Content-Type: application/json")
            check_json(body)
        unread: list[bytes] = [body]

        async def again() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        return again

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        declared = header(scope, b"content-length") or b"0"
        # Of more digits than any size has, Python makes no number.
        if len(declared) > 18 or not declared.isdigit() or int(declared) > self._max_body:
            raise self._too_large()
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> ApiError:
        text = f"the body must have at most {self._max_body} bytes"
        return ApiError(413, text, headers=_CLOSE)


# With part of a body unread, the connection is of no further use.
_CLOSE = {"Connection": "close"}


class _GoneError(Exception):
    """The client went away before its request was whole."""


def check_json(body: bytes) -> None:
    """Refuses what is not JSON in the strict sense.

    Args:
        body: of a request.

    Raises:
        ApiError: it is not: 400.
    """
    try:
        value = parse_json(body, "the body")
    except MeshwenError as error:
        raise ApiError(400, str(error), code="invalid_json") from None
    if _MAYBE_NOT_FINITE.search(body):
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            text = "the body has NaN, or a number beyond what can be computed with"
            raise ApiError(400, text, code="invalid_json") from None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
