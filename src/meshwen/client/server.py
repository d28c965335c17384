# SPDX-License-Identifier: Apache-2.0
"""`Server`: requests to an OpenAI-compatible server, with errors of one line."""

from __future__ import annotations

import email.utils
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NotRequired, TypeVar
from urllib.parse import urlsplit

from typing_extensions import TypedDict

from meshwen.common.arguments import brief, meant
from meshwen.common.extras import how_to_install
from meshwen.common.json_files import check_shape, parse_json
from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    import httpx

_BUSY = {429, 502, 503, 504}
_LARGEST_ANSWER_BYTES = 64 << 20
_LONGEST_WAIT = 60.0  # seconds between two tries
_SHOWN = 300  # characters of what a server says

Found = TypeVar("Found")


class RefusedError(MeshwenError):
    """The server refused a request.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class _Model(TypedDict):
    id: str


class _Models(TypedDict):
    data: list[_Model]


class _Problem(TypedDict):
    message: str


class _Error(TypedDict):
    error: NotRequired[_Problem]


class Body:
    """The bytes of a response as they come."""

    def __init__(self, response: httpx.Response):
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        """Yields them, once."""
        return self._response.iter_bytes()

    def hang_up(self) -> None:
        """Ends the connection, and with it the wait for more; any thread may call it."""
        network = self._response.extensions.get("network_stream")
        found = None if network is None else network.get_extra_info("socket")
        if found is not None:
            with suppress(OSError):
                found.shutdown(socket.SHUT_RDWR)


class Server:
    """An OpenAI-compatible server; any thread may call it.

    Args:
        url: of the server; that of its interface, which ends with /v1, will do too.
        api_key: what it asks for; None: nothing.
        timeout: the most seconds that it may be silent.
        tries: how often a request is sent to a server that is busy, or breaks off.
        transport: httpx's, in place of a network.
        wait: sleeps so many seconds.

    Raises:
        MeshwenError: the URL is none, or httpx is not installed.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float = 600.0,
        tries: int = 6,
        transport: httpx.BaseTransport | None = None,
        wait: Callable[[float], None] = time.sleep,
    ):
        try:
            import httpx
        except ImportError:
            raise MeshwenError(f"asking a server needs httpx: {how_to_install('client')}") from None
        self.url = _checked_url(url)
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise MeshwenError("the API key must be printable ASCII characters")
        self._httpx, self._timeout, self._tries, self._wait = httpx, timeout, tries, wait
        self._client = httpx.Client(
            base_url=f"{self.url}/v1",
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(timeout, connect=min(10.0, timeout)),
            # As many as ask: the number of threads is the limit.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            transport=transport,
        )

    def close(self) -> None:
        """Closes all connections."""
        self._client.close()

    def models(self) -> list[str]:
        """The names of its models, its own first choice first."""
        found = check_shape(self._json("GET", "/models"), _Models, f"{self.url}/v1/models")
        if not found["data"]:
            raise MeshwenError(f"{self.url} has no model")
        return [one["id"] for one in found["data"]]

    def model(self, name: str | None) -> str:
        """The model of this name; None: the server's first.

        Raises:
            MeshwenError: there is none of this name.
        """
        names = self.models()
        if name is None or name in names:
            return name or names[0]
        raise MeshwenError(
            f"{self.url} has no model {name!r}{meant(name, names, most=1)}; it has "
            f"{', '.join(names[:20])}"
        )

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that a request is answered with, once there is room for it.

        Args:
            path: after /v1: "/completions".
            body: of the request.

        Raises:
            RefusedError: the server refuses it.
            MeshwenError: there is no answer.
        """
        return self._json("POST", path, body)

    @contextmanager
    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Body]:
        """Gives a response as it comes. Arguments and errors are those of `post`."""
        with self._named_errors():
            response = self._send("POST", path, body)
            try:
                yield Body(response)
            finally:
                response.close()

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        with self._named_errors():
            response = self._send(method, path, body)
            try:
                text = _read(response, self.url)
            finally:
                response.close()
        return self._parsed(text, path)

    def _parsed(self, text: bytes, path: str) -> Any:
        try:
            return parse_json(text, f"{self.url}/v1{path}")
        except MeshwenError as error:
            raise MeshwenError(f"{error}: is this an OpenAI-compatible server?") from None

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        """A response with status 200, its body unread."""
        for left in reversed(range(self._tries)):
            try:
                request = self._client.build_request(method, path.removeprefix("/"), json=body)
                response = self._client.send(request, stream=True)
            except (self._httpx.RemoteProtocolError, self._httpx.ReadError):
                if not left:
                    raise
                self._wait(self._pause(None, left))  # The server was stopped, or started anew.
                continue
            if response.is_success:
                return response
            error = self._refusal(response, path)
            if response.status_code not in _BUSY or not left:
                raise error
            self._wait(self._pause(response, left))
        raise AssertionError("a server is asked at least once")

    def _pause(self, response: httpx.Response | None, left: int) -> float:
        """Seconds until the next try: what the server asks for, or twice as long each time."""
        asked = None if response is None else _retry_after(response.headers.get("retry-after"))
        doubled = 0.5 * 2 ** (self._tries - 1 - left)
        return min(_LONGEST_WAIT, doubled if asked is None else asked)

    def _refusal(self, response: httpx.Response, path: str) -> RefusedError:
        """What the server says of a request that it does not answer; closes the response."""
        try:
            text = _read(response, self.url)
        finally:
            response.close()
        status, said = response.status_code, _message(text)
        if status in (401, 403):
            what = f"{self.url} refuses the API key: give the right one with --api-key"
            what += f" ({said})" if said else ""
        elif said is None:
            what = (
                f"{self.url} answered {response.request.method} /v1{path} with status {status}: "
                "is this an OpenAI-compatible server?"
            )
        else:
            what = f"{self.url} answered with status {status}: {said}"
        return RefusedError(what, status)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Makes httpx's errors one line for users."""
        httpx = self._httpx
        try:
            yield
        except httpx.ConnectTimeout:
            what = f"cannot connect to {self.url}: it does not answer"
        except httpx.ConnectError as error:
            what = f"cannot connect to {self.url}: {_cause(error)}; is the server running?"
        except httpx.TimeoutException:
            what = f"{self.url} was silent for {self._timeout:g} s: see --timeout"
        except httpx.TransportError as error:
            what = f"the connection to {self.url} broke off: {_cause(error)}"
        except httpx.DecodingError:
            what = f"{self.url} sent a body that cannot be decoded"
        else:
            return
        raise MeshwenError(what)


def _checked_url(text: str) -> str:
    """The address of a server, without what all requests have."""
    url = text.strip() if "://" in text else f"http://{text.strip()}"
    url = url.rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        whole = False
    if not whole or parts.query or parts.fragment or any(c.isspace() for c in url):
        raise MeshwenError(f"--url must be like http://127.0.0.1:8000, not {brief(text)}")
    if parts.username or parts.password:
        raise MeshwenError("--url must hold no password: give a key with --api-key")
    return url


def _retry_after(text: str | None) -> float | None:
    """The seconds of a Retry-After header, which may be a date; None where it is neither."""
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _read(response: httpx.Response, url: str) -> bytes:
    """The body, up to a limit."""
    found = bytearray()
    for piece in response.iter_bytes():
        found += piece
        if len(found) > _LARGEST_ANSWER_BYTES:
            raise MeshwenError(f"{url} sent more than {_LARGEST_ANSWER_BYTES >> 20} MiB")
    return bytes(found)


def _message(text: bytes) -> str | None:
    """The message of an error in OpenAI's shape; None where it has another."""
    try:
        found = check_shape(parse_json(text, "an error"), _Error, "an error")
        return " ".join(found["error"]["message"].split())[:_SHOWN]
    except (MeshwenError, KeyError):
        return None


def _cause(error: BaseException) -> str:
    """What the system says of a connection, in a few words."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]
