# SPDX-License-Identifier: Apache-2.0
"""A server without a model: an engine that answers what a test tells it to, and the app over it.

    async with serving("Hello!") as server:
        response = await server.client.post("/v1/completions", json={"prompt": "Hi"})
        assert server.engine.requests[0].prompt_tokens == ...

It has the demo checkpoint's tokenizer and config. Nothing here compiles or computes.
`client` gives a response when it is whole: `call` gives it piece by piece, and can go away.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from typing import Any

import httpx

from meshwen import demo
from meshwen.engine.answer_text import AnswerText
from meshwen.engine.compiled_grammars import Grammars
from meshwen.engine.request import Completion, Event, Request, Timings, check_prompt, check_sampling
from meshwen.models.registry import config_from_json
from meshwen.server.app import create_app
from meshwen.server.engine_thread import EngineThread
from meshwen.server.metrics import Metrics
from meshwen.server.options import ServerOptions
from meshwen.server.serving import Serving
from meshwen.tokenizer.files import read_folder
from meshwen.tokenizer.tokenizer import Tokenizer

PATIENCE = 20.0  # seconds: what should come has hung
MAX_MODEL_LEN = 1024
CREATED = 1_750_000_000
EOS = 1023  # <|im_end|> of the demo checkpoint.

# What is answered: to all the same, or by the request and the number of its choice.
Script = str | Callable[[Request, int], str]


@cache
def tokenizer(template: str | None = None) -> Tokenizer:
    """The demo checkpoint's, with its own chat template or another."""
    if template is None:
        return Tokenizer.from_folder(demo.path())
    return Tokenizer(replace(read_folder(demo.path()), templates={"default": template}))


@cache
def config():
    """The demo checkpoint's."""
    return config_from_json(demo.path())


@cache
def grammars() -> Grammars:
    """Grammars over its vocabulary."""
    return Grammars(tokenizer(), frozenset({EOS}), config().vocab_size)


def logprob(token: int) -> float:
    """What the engine below says of a token."""
    return -(1 + token % 7) / 8


def top_logprobs(token: int, count: int) -> tuple[tuple[int, float], ...]:
    """The likeliest in a token's place: itself and those after it."""
    return tuple((token + i, -(1 + i) / 16) for i in range(count))


def in_loop(test: Callable[..., Any]) -> Callable[..., None]:
    """Makes a test of a coroutine function; it fails when it hangs."""

    @wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **named), 3 * PATIENCE))

    return run


@dataclass
class _Answer:
    """One choice of a request that is being answered."""

    request: Request
    number: int
    choice: int
    left: list[int]
    text: AnswerText
    on_event: Callable[[Event], None]
    tokens: list[int] = field(default_factory=list)


class ScriptedEngine:
    """Gives each request the tokens of a scripted text, one a step, and an end-of-text token.

    Attributes:
        requests: those that were submitted.
        cancelled: the numbers of those that were cancelled.
        steps: how many were taken.
        slots: answers that get a token in a step.
        go: cleared, the next step waits until it is set.
        pause: seconds that a step takes.
        failure: what the next step raises, once; all requests are lost then.
        cached_tokens: what completions say of their prompts.
    """

    def __init__(self, script: Script = "Hello!", slots: int = 8):
        self._script = script if callable(script) else lambda request, choice: script
        self.slots = slots
        self._live: list[_Answer] = []
        self._next = 0
        self.requests: list[Request] = []
        self.cancelled: list[int] = []
        self.steps = self.cached_tokens = 0
        self.go = threading.Event()
        self.go.set()
        self.pause = 0.0
        self.failure: Exception | None = None

    @property
    def busy(self) -> bool:
        return bool(self._live)

    @property
    def waiting(self) -> int:
        live = list(self._live)
        begun = {one.number for one in live[: self.slots]}
        return len({one.number for one in live} - begun)

    def unfinished(self, number: int) -> bool:
        return any(one.number == number for one in self._live)

    def check(self, request: Request, name: str) -> None:
        check_prompt(request.prompt_tokens, config(), name, MAX_MODEL_LEN)
        check_sampling(request, config(), name)

    def check_grammar(self, grammar: str) -> None:
        grammars().compiled(grammar)

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> int:
        self.check(request, "the prompt")
        number = self._next
        self._next += request.sampling.n
        self.requests.append(request)
        for choice in range(request.sampling.n):
            tokens = [*tokenizer().encode(self._script(request, choice)), EOS]
            text = AnswerText(tokenizer(), request.sampling.stop, request.sampling.include_stop)
            self._live.append(_Answer(request, number, choice, tokens, text, on_event))
        return number

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)
        self._live = [one for one in self._live if one.number != number]

    def step(self) -> None:
        assert self.go.wait(PATIENCE)
        time.sleep(self.pause)
        self.steps += 1
        if self.failure is not None:
            failure, self.failure = self.failure, None
            self._live.clear()
            raise failure
        for one in self._live[: self.slots]:
            event = self._event(one)
            if event.completion is not None:
                self._live.remove(one)
            one.on_event(event)

    def _event(self, one: _Answer) -> Event:
        sampling = one.request.sampling
        token = one.left.pop(0)
        one.tokens.append(token)
        text = one.text.push(token)
        ends = token == EOS and not sampling.ignore_eos
        stop: int | str | None = one.text.stop_string
        if token in sampling.stop_token_ids and not ends:
            stop = token
        reason = "stop" if ends or stop is not None else None
        prompt = len(one.request.prompt_tokens)
        if reason is None and (
            len(one.tokens) >= min(sampling.max_new_tokens, MAX_MODEL_LEN - prompt) or not one.left
        ):
            reason = "length"
        if reason is not None:
            text += one.text.finish()
        return Event(
            one.number,
            token,
            text,
            logprob(token) if sampling.logprobs else None,
            None if reason is None else self._completion(one, reason, stop),
            top_logprobs(token, sampling.top_logprobs) if sampling.top_logprobs else None,
            one.choice,
        )

    def _completion(self, one: _Answer, reason, stop) -> Completion:
        sampling, prompt = one.request.sampling, one.request.prompt_tokens
        count = sampling.top_logprobs
        scored, top = sampling.prompt_logprobs, sampling.prompt_logprobs and count
        return Completion(
            prompt_tokens=prompt,
            tokens=tuple(one.tokens),
            text=one.text.shown,
            finish_reason=reason,
            logprobs=tuple(map(logprob, one.tokens)) if sampling.logprobs else None,
            timings=Timings(queue_seconds=0.25, time_to_first_token=0.5, decode_seconds=1.0),
            seed=sampling.seed + one.choice if sampling.temperature else None,
            stop_reason=stop,
            top_logprobs=tuple(top_logprobs(t, count) for t in one.tokens) if count else None,
            prompt_logprobs=(None, *map(logprob, prompt[1:])) if scored else None,
            prompt_top_logprobs=(
                (None, *(top_logprobs(t, count) for t in prompt[1:])) if top else None
            ),
            cached_tokens=self.cached_tokens,
            choice=one.choice,
        )


class Call:
    """One request to an ASGI app, whose response comes piece by piece."""

    def __init__(self, app: Any, method: str, path: str, body: bytes, headers: Mapping[str, str]):
        self._app, self._gone = app, asyncio.Event()
        self._body: bytes | None = body
        self._sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 8000),
        }
        self.task = asyncio.create_task(self._app(self._scope, self._receive, self._sent.put))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def next(self) -> dict[str, Any]:
        """The next ASGI message of the response."""
        return await asyncio.wait_for(self._sent.get(), PATIENCE)

    async def rest(self) -> bytes:
        """The body from here on."""
        body, more = b"", True
        while more:
            message = await self.next()
            body += message.get("body", b"")
            more = message["type"] != "http.response.body" or message.get("more_body", False)
        return body

    async def leave(self) -> None:
        """The client goes away; returns when the app has ended the call."""
        self._gone.set()
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(self.task, PATIENCE)


@dataclass
class Server:
    """What a test talks to.

    Attributes:
        engine: gives the answers.
        thread: that it runs in.
        serving: what the handlers share.
        app: the application.
        client: sends requests to it.
    """

    engine: ScriptedEngine
    thread: EngineThread
    serving: Serving
    app: Any
    client: httpx.AsyncClient

    def call(self, path: str, body: Any, headers: Mapping[str, str] = {}) -> Call:
        """Sends a request whose response comes piece by piece."""
        given = {"content-type": "application/json", **headers}
        return Call(self.app, "POST", path, json.dumps(body).encode(), given)


@asynccontextmanager
async def serving(
    script: Script | ScriptedEngine = "Hello!",
    generation_config: Mapping[str, Any] | None = None,
    with_tokenizer: bool = True,
    template: str | None = None,
    **options: Any,
) -> AsyncIterator[Server]:
    """A server over a scripted engine.

    Args:
        script: what is answered; or the engine itself.
        generation_config: the checkpoint's sampling defaults.
        with_tokenizer: whether the model has one.
        template: its chat template; None: the demo checkpoint's.
        options: fields of `ServerOptions`.
    """
    engine = script if isinstance(script, ScriptedEngine) else ScriptedEngine(script)
    given = ServerOptions(**options)
    names = given.served_model_name or ("demo",)
    metrics = Metrics(names[0])
    thread = EngineThread(engine, given.max_queue, engine.slots, metrics.meter)
    metrics.watch(thread)
    thread.start()
    shared = Serving(
        engine=thread,
        tokenizer=tokenizer(template) if with_tokenizer else None,
        config=config(),
        max_model_len=MAX_MODEL_LEN,
        generation_config={} if generation_config is None else generation_config,
        names=names,
        fingerprint="fp_test",
        options=given,
        created=CREATED,
        metrics=metrics,
    )
    app = create_app(shared)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    client = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=PATIENCE)
    try:
        async with client:
            yield Server(engine, thread, shared, app, client)
    finally:
        engine.go.set()
        await asyncio.wait_for(thread.close(), PATIENCE)
