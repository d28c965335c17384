# SPDX-License-Identifier: Apache-2.0
"""The socket that the server listens at, opened before the model is loaded."""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from meshwen.common.arguments import brief
from meshwen.errors import MeshwenError
from meshwen.server.options import ServerOptions

_BACKLOG = 2048  # Connections that may wait to be accepted.
_MOST_FILES = 1 << 16


def allow_many_connections() -> None:
    """Lets the process have as many files, and so connections, as the system lets it ask for."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
        if soft != resource.RLIM_INFINITY and soft < most:
            with suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextmanager
def listening(options: ServerOptions) -> Iterator[tuple[socket.socket, str]]:
    """Gives the socket, and its address as a URL.

    Raises:
        MeshwenError: the address is in use, or is none of this machine's.
    """
    if options.uds is not None:
        opened, url = _unix_socket(options.uds), f"unix:{options.uds}"
    else:
        opened = _tcp_socket(options.host, options.port)
        host, port = opened.getsockname()[:2]
        scheme = "https" if options.ssl_certfile else "http"
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        yield opened, url
    finally:
        opened.close()
        if options.uds is not None:
            with suppress(OSError):
                os.unlink(options.uds)


def _tcp_socket(host: str, port: int) -> socket.socket:
    where = f"{host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise MeshwenError(f"host must be an address, not {brief(host)}: {error}") from None
    family, kind, protocol, _, address = found[0]
    opened = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(_BACKLOG)
    except OSError as error:
        opened.close()
        hint = "; give another --port" if error.errno == errno.EADDRINUSE else ""
        raise MeshwenError(f"cannot listen at {where}: {error.strerror}{hint}") from None
    return opened


def _unix_socket(path: str) -> socket.socket:
    if not hasattr(socket, "AF_UNIX"):
        raise MeshwenError("uds needs a system with Unix sockets; leave it out")
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_left_over(path)
        opened.bind(path)
        os.chmod(path, 0o660)
        opened.listen(_BACKLOG)
    except OSError as error:
        opened.close()
        what = error.strerror or str(error)
        raise MeshwenError(f"uds {path} cannot be listened at: {what}") from None
    return opened


def _remove_left_over(path: str) -> None:
    """Removes the socket of a server that has ended; one that answers stays, as do other files."""
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(Path(path).stat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(path)
                except ConnectionRefusedError:
                    os.unlink(path)
