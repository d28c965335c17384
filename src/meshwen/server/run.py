# SPDX-License-Identifier: Apache-2.0
"""The server's life: it listens, loads the model, answers, and ends when what it began is done."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvicorn

from meshwen.errors import MeshwenError
from meshwen.server.app import create_app
from meshwen.server.engine_thread import EngineThread, Stepping
from meshwen.server.gate import Gate
from meshwen.server.listening import allow_many_connections, listening
from meshwen.server.metrics import Metrics
from meshwen.server.options import ServerOptions
from meshwen.server.serving import Serving

if TYPE_CHECKING:
    from meshwen.causal_lm import CausalLM
    from meshwen.server.layout import Layout

_KEEP_ALIVE = 75  # Seconds that a connection may be idle: longer than clients and proxies reuse it.
_MOST_HEADER_BYTES = 64 << 10  # Beyond this the connection is cut.
_LAST_STEP = 5.0  # Seconds that the engine's last step has, when the server ends.
_LAST_WORDS = 1  # Seconds for the errors that requests end with then.


@dataclass(frozen=True)
class Loaded:
    """A model that is ready.

    Attributes:
        model: the model; nobody else may have it compute from now on.
        fingerprint: see `meshwen.server.fingerprint`.
        layout: how it lies on its mesh.
    """

    model: CausalLM
    fingerprint: str
    layout: Layout


class ModelServer:
    """Serves a model from `run` until `stop`.

    Args:
        options: how.
        name: of the model, where the options give it none.
        load: loads it, in a thread of its own: till then /health answers 503.
        say: is told in a line what goes on.
    """

    def __init__(
        self,
        options: ServerOptions,
        name: str,
        load: Callable[[], Loaded],
        say: Callable[[str], None],
    ):
        self._options, self._load, self._say = options, load, say
        self._names = options.served_model_name or (name,)
        self._gate = Gate()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._stopped = False
        self._close_engine = lambda: None

    def run(self) -> bool:
        """Serves until `stop`.

        Returns:
            Whether all that was asked has been answered.

        Raises:
            MeshwenError: the address cannot be had, or there is something wrong with the model or
                the certificate.
        """
        return asyncio.run(self._run())

    def stop(self) -> None:
        """Ends it: no further requests; those that run may finish. For signal handlers too."""
        self._stopped = True
        if self._loop is not None and self._stop is not None:
            with suppress(RuntimeError):  # The loop is closed: it has ended.
                self._loop.call_soon_threadsafe(self._stop.set)

    async def _run(self) -> bool:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        if self._stopped:
            self._stop.set()
        allow_many_connections()
        with listening(self._options) as (opened, url):
            http = _Http(_http_config(self._gate, self._options))
            task = asyncio.create_task(http.serve(sockets=[opened]))
            try:
                return await self._serve(url, task)
            finally:
                http.should_exit = True
                await task

    async def _serve(self, url: str, http: asyncio.Task[None]) -> bool:
        assert self._stop is not None
        self._say(f"listening at {url}, loading {self._names[0]}")
        stop = asyncio.create_task(self._stop.wait())
        started = time.monotonic()
        loading = asyncio.create_task(_in_a_thread(self._load))
        done, _ = await asyncio.wait((loading, stop, http), return_when=asyncio.FIRST_COMPLETED)
        if loading not in done:
            loading.cancel()
            return False
        thread = self._start(loading.result())
        self._say(f"ready at {url} after {time.monotonic() - started:.1f} s")
        await asyncio.wait((stop, http), return_when=asyncio.FIRST_COMPLETED)
        return await self._drain(thread)

    def _start(self, loaded: Loaded) -> EngineThread:
        """Lets requests through to a model."""
        model, engine, options = loaded.model, loaded.model.engine, self._options
        metrics, slots = Metrics(self._names[0]), engine.cache_plan.max_num_seqs
        stepping, self._close_engine = _stepping(model)
        thread = EngineThread(stepping, options.max_queue, slots, metrics.meter)
        metrics.watch(thread, lambda: engine.cache_stats)
        thread.start()
        self._gate.app = create_app(
            Serving(
                engine=thread,
                tokenizer=model.tokenizer,
                config=model.config,
                max_model_len=engine.max_model_len,
                generation_config=model.generation_config,
                names=self._names,
                fingerprint=loaded.fingerprint,
                options=options,
                created=int(time.time()),
                layout=loaded.layout,
                cache_stats=lambda: engine.cache_stats,
                metrics=metrics,
            )
        )
        return thread

    async def _drain(self, thread: EngineThread) -> bool:
        """Waits for the requests that run; after the time for it, ends them with an error."""
        gate, seconds = self._gate, self._options.shutdown_timeout
        gate.draining = True
        self._say(f"stopping: running requests ({gate.running}) have {seconds:g} s to finish")
        with suppress(TimeoutError):
            await asyncio.wait_for(gate.idle(), seconds)
        finished = not gate.running
        if not finished:
            self._say(f"stopping: requests that have not finished ({gate.running}) are cut off")
        with suppress(TimeoutError):
            await asyncio.wait_for(thread.close(), _LAST_STEP)
            self._close_engine()
            await asyncio.wait_for(gate.idle(), _LAST_WORDS)
        self._say("stopped")
        return finished


def _stepping(model: CausalLM) -> tuple[Stepping, Callable[[], None]]:
    """What steps, and what lets the other processes go, if the mesh spans any."""
    if not model.mesh.is_multi_process:
        return model.engine, lambda: None
    from meshwen.server.following import LeadingEngine

    leading = LeadingEngine(model.engine)
    return leading, leading.close


class _Http(uvicorn.Server):
    """Leaves signals to whoever runs the server."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _http_config(gate: Gate, options: ServerOptions) -> uvicorn.Config:
    config = uvicorn.Config(
        gate,
        http="h11",  # It bounds headers; others may not, and which is installed is chance.
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,  # It has what is behind the question mark.
        server_header=False,
        root_path=options.root_path,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_LAST_WORDS,
        h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
    )
    try:
        config.load()
    except OSError as error:  # Of `ssl`, too.
        raise MeshwenError(
            f"the certificate cannot be used ({error.strerror or error}): give PEM files as "
            "--ssl-certfile and --ssl-keyfile"
        ) from None
    return config


async def _in_a_thread(function: Callable[[], Loaded]) -> Loaded:
    """What a function returns or raises; its thread does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[Loaded] = loop.create_future()

    def give(result: Loaded | None, error: BaseException | None) -> None:
        if found.done():  # Nobody waits any more.
            return
        if error is not None:
            found.set_exception(error)
        elif result is not None:
            found.set_result(result)

    def work() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # The server has ended.
            loop.call_soon_threadsafe(give, result, error)

    threading.Thread(target=work, name="loading", daemon=True).start()
    return await found
