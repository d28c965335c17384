# SPDX-License-Identifier: Apache-2.0
"""`meshwen serve`: a model behind an HTTP interface."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from meshwen.cli import options
from meshwen.cli.console import note
from meshwen.cli.files import check_readable
from meshwen.cli.interrupt import handled
from meshwen.cli.load import load_model, opened, put_prefix
from meshwen.cli.option_groups import group, with_groups
from meshwen.common.extras import how_to_install
from meshwen.common.option_fields import options_of
from meshwen.engine.options import EngineOptions
from meshwen.errors import MeshwenError
from meshwen.server.options import ServerOptions

if TYPE_CHECKING:
    from meshwen.checkpoints import Checkpoint
    from meshwen.server.run import Loaded
    from meshwen.tokenizer.tokenizer import Tokenizer


def _server_options() -> Callable[..., ServerOptions]:
    """A group of all options of `ServerOptions`."""
    many = {name for name, one in options_of(ServerOptions).items() if one.many}

    def checked(**given: Any) -> ServerOptions:
        given |= {name: given[name] or () for name in many}
        with options.naming_flags(given):
            return ServerOptions(**given)

    flags = {
        name: options.flag(ServerOptions, name, **({"default": None} if name in many else {}))
        for name in options_of(ServerOptions)
    }
    return group(checked, flags)


@with_groups(
    engine=options.engine_options(
        *options.LOADING,
        *options.MEMORY,
        "max_num_batched_tokens",
        "prompt_lookup_num_tokens",
        max_num_seqs=32,
    ),
    server=_server_options(),
)
def serve(
    model: options.Model = "demo",
    *,
    engine: EngineOptions,
    server: ServerOptions,
    load_prefix: options.LoadPrefix = None,
    debug: options.Debug = False,
) -> None:
    """Serve a model over HTTP, to clients of OpenAI's and Anthropic's interfaces.

    /health answers 503 until the model is loaded. SIGTERM or Ctrl-C lets running requests finish; a
    second one stops at once. All that is printed goes to stderr.
    """
    try:
        import fastapi  # noqa: F401
    except ModuleNotFoundError:
        raise MeshwenError(
            f"meshwen serve needs further packages: {how_to_install('serve')}"
        ) from None
    from meshwen.parallel.distributed import process_index
    from meshwen.server.following import follow
    from meshwen.server.run import ModelServer
    from meshwen.tokenizer.tokenizer import Tokenizer

    check_readable(load_prefix)
    with options.naming_flags(options_of(ServerOptions)):
        server.api_keys()  # Refuses wrong ones before anything is loaded.
    engine.make_mesh()  # Refuses a mesh without its devices before anything listens.
    checkpoint = opened(model, engine)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)

    def load() -> Loaded:
        with checkpoint:
            return _loaded(checkpoint, tokenizer, engine, server, load_prefix)

    if process_index():
        with handled(lambda number: None):  # Process 0 says when all that was asked is answered.
            follow(load().model.engine)
        return
    running, stopped_by = ModelServer(server, model, load, note), []

    def stop(number: int) -> None:
        stopped_by.append(number)
        running.stop()

    with _log_on_stderr(), options.naming_flags(options_of(ServerOptions)), handled(stop):
        finished = running.run()
    if not finished:
        raise typer.Exit(128 + stopped_by[0] if stopped_by else 1)


def _loaded(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    engine: EngineOptions,
    server: ServerOptions,
    load_prefix: Any,
) -> Loaded:
    """The model, ready to answer."""
    from meshwen.server.fingerprint import system_fingerprint
    from meshwen.server.layout import Layout
    from meshwen.server.run import Loaded
    from meshwen.server.warmup import warm_up

    model = load_model(checkpoint, tokenizer, engine)
    put_prefix(model, load_prefix)
    # The server's queue has the limit; in every process alike.
    model.engine.max_waiting = server.max_queue + model.engine.cache_plan.max_num_seqs
    fingerprint = system_fingerprint(checkpoint, model)
    if server.warmup:
        note("warming up: compiling the usual steps (--no-warmup leaves it out)")
        warm_up(model.engine)
    return Loaded(
        model=model,
        fingerprint=fingerprint,
        layout=Layout.of(model, engine.numerics),
    )


class _Notes(logging.Handler):
    """Writes log records as lines on stderr, and what failed after them."""

    def emit(self, record: logging.LogRecord) -> None:
        note(self.format(record))


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Shows what the server logs, and warnings of the HTTP library."""
    handler = _Notes()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logs = {"meshwen.server": logging.INFO, "uvicorn": logging.WARNING}
    before = {}
    for name, level in logs.items():
        log = logging.getLogger(name)
        before[log] = log.level
        log.setLevel(level)
        log.addHandler(handler)
    try:
        yield
    finally:
        for log, level in before.items():
            log.setLevel(level)
            log.removeHandler(handler)
