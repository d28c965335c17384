# SPDX-License-Identifier: Apache-2.0
"""In exact numerics a request gets the same bytes alone on a cold engine and under any load."""

import asyncio
import json
import os
import random
import re
from collections.abc import Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import httpx
import pytest

from mesh_model import MeshModel
from meshwen import AutoModelForCausalLM
from meshwen.cache.budget import KVCachePlan
from meshwen.engine.engine import Engine
from meshwen.engine.runner import ModelRunner
from meshwen.server.app import create_app
from meshwen.server.engine_thread import EngineThread
from meshwen.server.options import ServerOptions
from meshwen.server.serving import Serving
from serving import EOS, Call, tokenizer
from tiny_model import ONE_LAYER

# Compiles for many minutes: `MESHWEN_FULL_LOAD=1 make test TESTS=tests/test_server_same_bytes.py`.
full = pytest.mark.skipif("MESHWEN_FULL_LOAD" not in os.environ, reason="MESHWEN_FULL_LOAD unset")
PATIENCE = 300.0  # seconds: what has not come by then has hung
LONGEST = 160  # tokens of a prompt and its answer
ROWS, BLOCKS = 4, 5  # answers at once, and KV blocks: as many as the longest needs
BUDGET = 16  # tokens of a step
QUEUE = 4096
# What differs between two answers to the same request.
_IDS = re.compile(r'"[a-z]+[-_][0-9a-f]{24}"')
_TIMES = re.compile(r'"(created|created_at|completed_at)":\d+')


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        path: where to.
        body: what is asked.
    """

    path: str
    body: dict[str, Any]


@cache
def runner(name: str, mesh: str, numerics: str) -> ModelRunner:
    """The demo model; or one layer of random weights, which compiles in a tenth of the time."""
    if name == "demo":
        return AutoModelForCausalLM.from_pretrained("demo", mesh=mesh, numerics=numerics).runner
    config = replace(ONE_LAYER, vocab_size=tokenizer().vocab_size)
    return MeshModel(config, mesh, "bfloat16", None, numerics).runner


@dataclass
class Served:
    """A cold engine of a model behind the application.

    Attributes:
        app: the application.
        client: sends requests to it.
        thread: that the engine runs in.
        engine: answers.
    """

    app: Any
    client: httpx.AsyncClient
    thread: EngineThread
    engine: Engine


@asynccontextmanager
async def served(of: ModelRunner):
    """An engine that nothing has been on, with few KV blocks."""
    parts = of.plan.data_devices
    plan = KVCachePlan(1 + BLOCKS, of.model.backend.block_size, 1, parts, ROWS, LONGEST)
    engine = Engine(of, tokenizer(), (EOS,), plan, QUEUE, max_num_batched_tokens=BUDGET)
    thread = EngineThread(engine, QUEUE, ROWS)
    thread.start()
    app = create_app(
        Serving(
            engine=thread,
            tokenizer=tokenizer(),
            config=of.config,
            max_model_len=engine.max_model_len,
            generation_config={},
            names=("demo",),
            fingerprint="fp_test",
            options=ServerOptions(max_queue=QUEUE, stream_keep_alive=0),
            created=0,
        )
    )
    transport = httpx.ASGITransport(app)
    try:
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", timeout=PATIENCE
        ) as client:
            yield Served(app, client, thread, engine)
    finally:
        await asyncio.wait_for(thread.close(), PATIENCE)


OPENINGS = (
    "Tom has 12 apples and buys 7 more at the market. How many apples does Tom have now, in all? ",
    "A train has 4 wagons with 30 seats each, and 17 of the seats are taken by passengers. ",
    "Anna reads 9 pages a day. ",
)
QUESTIONS = ("How many are left?", "Why?", "Then 3 more come.", "And how many would two have?")
# The first alone is drawn in the quick test: each further one is another program for every shape.
SAMPLING = (
    {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.1},
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 20},
    {"temperature": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    {"temperature": 0.0, "repetition_penalty": 1.3},
)


def requests(draw: random.Random, count: int, kinds: int) -> list[Asked]:
    """Requests of every protocol, of which most begin as others do, with kinds of sampling."""
    makers = (_chat, _completion, _tokens, _chat, _completion, _message, _response)
    found = []
    for number in range(count):
        sampling = {"seed": number} | draw.choice(SAMPLING[:kinds])
        found.append(makers[number % len(makers)](draw, number, sampling))
    return found


def _unpenalised(sampling: dict[str, Any]) -> dict[str, Any]:
    """What Anthropic's requests and responses have fields for."""
    without = ("presence_penalty", "frequency_penalty")
    return {name: value for name, value in sampling.items() if name not in without}


def _text(draw: random.Random) -> str:
    return draw.choice(OPENINGS) + draw.choice(QUESTIONS) * draw.choice((1, 1, 2))


def _turns(draw: random.Random) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": _text(draw)}]
    if draw.random() < 0.3:
        turns += [{"role": "assistant", "content": "It is 19."}, {"role": "user", "content": "So?"}]
    return turns


def _length(draw: random.Random) -> int:
    return draw.choice((1, 6, 40, 56))


def _chat(draw: random.Random, number: int, sampling: dict[str, Any]) -> Asked:
    body = {"messages": _turns(draw), "max_tokens": _length(draw), **sampling}
    body |= draw.choice(
        (
            {},
            {"logprobs": True, "top_logprobs": 2},
            {"stream": True, "logprobs": True, "top_logprobs": 2},
            {"stream": True, "n": 2, "stream_options": {"include_usage": True}},
            {"n": 3, "stop": [" is", "9"]},
            {"stop": "\n", "include_stop_str_in_output": True, "return_token_ids": True},
        )
    )
    return Asked("/v1/chat/completions", body)


def _completion(draw: random.Random, number: int, sampling: dict[str, Any]) -> Asked:
    prompt = draw.choice((_text(draw), [_text(draw), _text(draw)], [5, 6, 7, number % 1000]))
    body = {"prompt": prompt, "max_tokens": _length(draw), **sampling}
    body |= draw.choice(
        (
            {},
            {"logprobs": 2},
            {"echo": True, "logprobs": 2},
            {"echo": True, "logprobs": 2, "max_tokens": 0},
            {"stream": True, "logprobs": 2, "stop": ["."]},
            {"min_tokens": 1, "ignore_eos": True, "logit_bias": {"40": 3.5, "7": -100}},
        )
    )
    return Asked("/v1/completions", body)


def _tokens(draw: random.Random, number: int, sampling: dict[str, Any]) -> Asked:
    begin = [11, 12, 13] * draw.choice((1, 12, 24))
    sampling = {"max_tokens": _length(draw), "logprobs": 2, **sampling}
    sampling |= draw.choice(({}, {"n": 2}, {"prompt_logprobs": 2, "max_tokens": 0}))
    body = {"token_ids": [*begin, number % 1000], "sampling_params": sampling}
    return Asked("/inference/v1/generate", body)


def _message(draw: random.Random, number: int, sampling: dict[str, Any]) -> Asked:
    body = {
        "model": "demo",
        "messages": _turns(draw),
        "max_tokens": _length(draw),
        **_unpenalised(sampling),
    }
    return Asked("/v1/messages", body | {"stream": draw.random() < 0.5})


def _response(draw: random.Random, number: int, sampling: dict[str, Any]) -> Asked:
    body = {"input": _text(draw), "max_output_tokens": _length(draw), **_unpenalised(sampling)}
    return Asked("/v1/responses", body | {"stream": draw.random() < 0.5})


def comparable(text: str) -> list[str]:
    """A response without ids and times; a stream's events by the choice that they belong to.

    When a stream's choice gets its next token is a matter of load; what it gets is not.
    """
    text = _TIMES.sub(r'"\1":0', _IDS.sub('"id"', text))
    return sorted(text.split("\n\n"), key=_choice)


def _choice(event: str) -> int:
    found = re.search(r'"choices":\[\{"index":(\d+)', event)
    return int(found[1]) if found else 1000


async def answer(server: Served, asked: Asked) -> list[str]:
    response = await server.client.post(asked.path, json=asked.body)
    assert response.status_code == 200, (asked, response.text)
    return comparable(response.text)


async def alone(of: ModelRunner, asked: Iterable[Asked]) -> list[list[str]]:
    """What each request gets on a cold engine of its own."""
    found = []
    for one in asked:
        async with served(of) as server:
            found.append(await asyncio.wait_for(answer(server, one), PATIENCE))
    return found


async def vanish(server: Served, asked: Asked, draw: random.Random) -> None:
    """Sends a request, and goes away before or while it is answered."""
    if draw.random() < 0.5:
        task = asyncio.create_task(answer(server, asked))
        await asyncio.sleep(draw.random() / 2)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return
    body = json.dumps(asked.body | {"stream": "prompt_logprobs" not in str(asked)}).encode()
    call = Call(server.app, "POST", asked.path, body, {"content-type": "application/json"})
    for _ in range(draw.choice((0, 1, 4))):
        if not call.task.done():
            with suppress(TimeoutError):
                await asyncio.wait_for(call._sent.get(), 1.0)
    await call.leave()


async def loaded(of: ModelRunner, asked: list[Asked], others: list[Asked]) -> list[list[str]]:
    """What the requests get among others, of which a fifth vanishes."""
    draw = random.Random(5)
    async with served(of) as server:
        tasks = [asyncio.create_task(answer(server, one)) for one in asked]
        for number, other in enumerate(others):
            does = vanish(server, other, draw) if number % 5 == 0 else answer(server, other)
            tasks.append(asyncio.create_task(does))
            if number % 4 == 0:
                await asyncio.sleep(0)
        found = await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
        stats = server.engine.cache_stats
        assert server.thread.failures == server.thread.waiting == server.thread.running == 0
        assert stats.used_blocks == 0
        assert stats.cached_tokens
        assert stats.evictions
        assert stats.preemptions
    return found[: len(asked)]


def shuffled(of: ModelRunner, asked: list[Asked], others: list[Asked]) -> list[list[str]]:
    """What `loaded` finds, the requests in another order; in theirs."""
    order = random.Random(6).sample(range(len(asked)), len(asked))
    found = asyncio.run(loaded(of, [asked[i] for i in order], others))
    return [found[order.index(i)] for i in range(len(asked))]


@dataclass(frozen=True)
class Size:
    """Of a test: the model, how many requests, among how many others, and kinds of sampling."""

    model: str
    count: int
    others: int
    kinds: int

    @property
    def asked(self) -> list[Asked]:
        """Those whose answers are compared."""
        return requests(random.Random(1), self.count, self.kinds)

    def check(self, mesh: str) -> None:
        """Holds what they get under load to it."""
        of = runner(self.model, mesh, "exact")
        others = requests(random.Random(2), self.others, self.kinds)
        found = shuffled(of, self.asked, others)
        three = zip(self.asked, expected(self), found, strict=True)
        assert [one for one in three if one[1] != one[2]] == []


@cache
def expected(size: Size) -> list[list[str]]:
    """What the requests get alone, on one device."""
    return asyncio.run(alone(runner(size.model, "1", "exact"), size.asked))


QUICK, FULL = Size("one layer", 7, 35, 1), Size("demo", 64, 256, len(SAMPLING))


@pytest.mark.parametrize("mesh", ["1", pytest.param("1x8", marks=pytest.mark.slow)])
def test_a_loaded_server_answers_in_the_bytes_of_an_idle_one(mesh):
    QUICK.check(mesh)


@pytest.mark.slow
@full
@pytest.mark.parametrize("mesh", ["1", "1x8"])
def test_64_requests_among_256_have_the_bytes_that_they_have_alone(mesh):
    FULL.check(mesh)


def test_another_seed_is_found():
    body = {"prompt": "Tom", "seed": 1, **SAMPLING[0]}
    asked, other = Asked("/v1/completions", body), Asked("/v1/completions", body | {"seed": 2})
    of = runner("one layer", "1", "exact")
    first, again, second = asyncio.run(alone(of, (asked, asked, other)))
    assert first == again
    assert first != second


@pytest.mark.slow
@full
def test_fast_numerics_round_by_the_batch():
    """The comparison finds it; where it does not, it says so."""
    of, others = runner("demo", "1", "fast"), requests(random.Random(2), 256, 1)
    asked = requests(random.Random(1), 64, 1)
    cold, found = asyncio.run(alone(of, asked)), shuffled(of, asked, others)
    different = sum(one != other for one, other in zip(cold, found, strict=True))
    print(f"fast numerics: {different} of 64 answers differ")
    if not different:
        pytest.skip("fast numerics gave the same bytes for 64 requests, too")
