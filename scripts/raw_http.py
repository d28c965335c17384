# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 over one connection, byte by byte, for clients that misbehave on purpose."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

LINE_LIMIT = 1 << 20  # bytes: a whole answer may be one line


class Response(NamedTuple):
    """What came: the status, the headers with small letters, and the body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Connection:
    """A connection to a server.

    Args:
        url: the server's: "http://HOST:PORT".
    """

    def __init__(self, url: str):
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> None:
        """Connects, unless it is connected."""
        if self._writer is None or self._writer.is_closing():
            self._reader, self._writer = await asyncio.open_connection(
                self._host, self._port, limit=LINE_LIMIT
            )

    def close(self) -> None:
        """Hangs up."""
        if self._writer is not None:
            self._writer.close()
            self._reader = self._writer = None

    async def send(self, path: str, body: Any, headers: Mapping[str, str], upto: int = -1) -> None:
        """Sends a request, or as many bytes of it."""
        await self.open()
        assert self._writer is not None
        content = json.dumps(body).encode() if body is not None else b""
        lines = [
            f"{'POST' if content else 'GET'} {path} HTTP/1.1",
            f"Host: {self._host}",
            *(f"{name}: {value}" for name, value in headers.items()),
            *(
                ["Content-Type: application/json", f"Content-Length: {len(content)}"]
                * bool(content)
            ),
        ]
        whole = "\r\n".join([*lines, "", ""]).encode() + content
        self._writer.write(whole if upto < 0 else whole[:upto])
        await self._writer.drain()

    async def receive(self, seconds_a_line: float = 0.0) -> Response:
        """The response; who reads slowly waits before each line of a stream.

        Raises:
            OSError, asyncio.IncompleteReadError, ValueError: it broke off, or is no HTTP.
        """
        assert self._reader is not None
        status = int((await self._line()).split()[1])
        headers: dict[str, str] = {}
        while line := await self._line():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if headers.get("transfer-encoding") != "chunked":
            body = await self._reader.readexactly(int(headers.get("content-length", "0")))
            return Response(status, headers, body)
        body = b""
        while size := int(await self._line(), 16):
            body += (await self._reader.readexactly(size + 2))[:-2]
            if seconds_a_line:
                await asyncio.sleep(seconds_a_line)
        await self._line()
        return Response(status, headers, body)

    async def surplus(self) -> bytes:
        """What came after the response, and should not have."""
        assert self._reader is not None
        with suppress(TimeoutError):
            return await asyncio.wait_for(self._reader.read(1 << 16), 0.05)
        return b""

    async def _line(self) -> str:
        assert self._reader is not None
        line = await self._reader.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionResetError("the connection ended within a response")
        return line[:-2].decode("latin-1")


async def fetch(url: str, path: str, body: Any = None, seconds: float = 60.0) -> Response:
    """The response to one request, on a connection of its own."""
    connection = Connection(url)
    try:
        await asyncio.wait_for(connection.send(path, body, {}), seconds)
        return await asyncio.wait_for(connection.receive(), seconds)
    finally:
        connection.close()
