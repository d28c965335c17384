# SPDX-License-Identifier: Apache-2.0
"""The server over a scripted engine (see `serving.py`), at a port of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import uvicorn

from serving import PATIENCE, Script, ScriptedEngine, Server, serving


class PausingEngine(ScriptedEngine):
    """Waits, once it has taken so many steps, until `go` is set."""

    def __init__(self, script: Script, steps: int):
        super().__init__(script)
        self._pause_after = steps

    def step(self) -> None:
        super().step()
        if self.steps == self._pause_after:
            self.go.clear()


@contextlib.contextmanager
def on_loopback(
    script: Script | ScriptedEngine = "Hello!", shared: dict[str, Any] | None = None, **options: Any
) -> Iterator[tuple[str, Server]]:
    """Gives the URL of a server, and what is behind it.

    Args:
        script: what is answered; or the engine itself.
        shared: further fields of `Serving`.
        options: fields of `ServerOptions`.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    found: list[Server] = []
    ready, done = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        async with serving(script, **options) as server:
            server.app.state.serving = replace(server.serving, **(shared or {}))
            config = uvicorn.Config(server.app, log_config=None, lifespan="off")
            http = uvicorn.Server(config)
            http.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
            task = asyncio.create_task(http.serve([listener]))
            while not http.started:
                await asyncio.sleep(0.01)
            found.append(server)
            ready.set()
            await done.wait()
            server.engine.go.set()
            http.should_exit = http.force_exit = True
            await asyncio.wait_for(task, PATIENCE)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    try:
        assert ready.wait(PATIENCE)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", found[0]
    finally:
        if loops:
            loops[0].call_soon_threadsafe(done.set)
        thread.join(PATIENCE)
        assert not thread.is_alive()
