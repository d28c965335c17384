# SPDX-License-Identifier: Apache-2.0
"""OpenAI servers under the load of several clients, beside the engine without a server.

    python benchmarks/servers.py --url ours=http://127.0.0.1:8000 --url vllm=http://127.0.0.1:8001
    python benchmarks/servers.py --url ours=http://127.0.0.1:8000 --bare PATH --dtype bfloat16

Each client asks for one answer after the other, streamed, at temperature 0: prompts of 512 token
ids that begin alike (`--shared`), 64 new tokens. Per target and number of clients: new tokens a
second over all clients; the median and 95th percentile of the time to the first token; the median
of the mean time between an answer's tokens. Targets take turns, `--rounds` times; every round is a
line of JSON, and the table at the end has each target's best round. A first round for each target
and number of clients compiles what there is to compile, and does not count. `--bare` is our own
engine in this process: what its throughput exceeds a server's by is that server's overhead.

Servers are started by whoever measures, one model and dtype for all, with room for 32 answers:
`meshwen serve --model PATH --max-num-seqs 32`, `vllm serve PATH --max-num-seqs 32`,
`llama-server -m FILE --parallel 32 -c 32768`. Nothing else should run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

VOCABULARY = 1000  # Token ids below are in every model's, the demo model's too.
ANSWER_SECONDS = 600.0


class Workload(NamedTuple):
    """What every client asks for: tokens of a prompt, those that all share, and of an answer."""

    prompt: int
    shared: int
    answer: int

    def prompts(self, count: int, seed: int) -> list[list[int]]:
        """Prompts that nobody has had but for what they share."""
        draw, same = random.Random(seed), random.Random(0)
        begin = [same.randrange(VOCABULARY) for _ in range(self.shared)]
        own = self.prompt - self.shared
        return [begin + [draw.randrange(VOCABULARY) for _ in range(own)] for _ in range(count)]


class Answer(NamedTuple):
    """When, in seconds from its request on, an answer's first and last token came; how many."""

    first: float
    last: float
    tokens: int


# Answers prompts for as many clients at once.
Target = Callable[[list[list[int]], int], Coroutine[Any, Any, list[Answer]]]


async def ask_server(
    prompts: list[list[int]], clients: int, *, url: str, model: str, tokens: int
) -> list[Answer]:
    """The answers of an OpenAI server."""
    left, found = iter(prompts), []

    async def client() -> None:
        for prompt in left:
            body = {
                "model": model,
                "prompt": prompt,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            found.append(await asyncio.wait_for(_streamed(url, body), ANSWER_SECONDS))

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


async def _streamed(url: str, body: dict[str, Any]) -> Answer:
    """One answer, over a connection of its own."""
    parts, content = urlsplit(url), json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 20)
    head = (
        f"POST {parts.path}/v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        "Content-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    writer.write(head.encode() + content)
    began, times, tokens, status = time.perf_counter(), [], 0, await reader.readline()
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if chunk.get("choices") and chunk["choices"][0].get("finish_reason") is None:
            times.append(time.perf_counter() - began)
        if chunk.get("usage"):
            tokens = chunk["usage"]["completion_tokens"]
    writer.close()
    if b" 200 " not in status or tokens != body["max_tokens"] or not times:
        raise SystemExit(f"{url}: {status!r}, {tokens} tokens in {len(times)} chunks")
    return Answer(times[0], times[-1], tokens)


def bare_engine(model: str, dtype: str, tokens: int, numerics: str) -> Target:
    """Our engine in this process, with nothing round it."""
    from meshwen import AutoModelForCausalLM
    from meshwen.engine.request import Event, Request
    from meshwen.engine.sampling_params import SamplingParams

    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, numerics=numerics, max_num_seqs=32
    )
    engine = loaded.engine
    sampling = SamplingParams(max_new_tokens=tokens, temperature=0.0, ignore_eos=True)

    async def ask(prompts: list[list[int]], clients: int) -> list[Answer]:
        left, found = iter(prompts), []

        def next_request() -> None:
            if (prompt := next(left, None)) is None:
                return
            began, times = time.perf_counter(), []

            def on_event(event: Event) -> None:
                times.append(time.perf_counter() - began)
                if event.completion is not None:
                    found.append(Answer(times[0], times[-1], len(times)))
                    next_request()

            engine.submit(Request(tuple(prompt), sampling), on_event)

        for _ in range(clients):
            next_request()
        while engine.busy:
            engine.step()
        return found

    return ask


def measured(answers: list[Answer], seconds: float) -> dict[str, float]:
    """What users see of these answers, which took so long together."""
    first = sorted(one.first for one in answers)
    return {
        "tokens_per_second": sum(one.tokens for one in answers) / seconds,
        "first_token_ms": 1e3 * statistics.median(first),
        "first_token_p95_ms": 1e3 * first[int(0.95 * (len(first) - 1))],
        "between_tokens_ms": 1e3
        * statistics.median((one.last - one.first) / (one.tokens - 1) for one in answers),
    }


def run(
    targets: dict[str, Target], workload: Workload, clients: int, answers: int, rounds: int
) -> dict[str, dict[str, float]]:
    """The best round of each target; a line of JSON for each round."""
    best: dict[str, dict[str, float]] = {}
    for number in range(-1, rounds):
        for name, ask in targets.items():
            prompts = workload.prompts(clients * answers, seed=1000 * clients + number)
            began = time.perf_counter()
            found = asyncio.run(ask(prompts, clients))
            row = measured(found, time.perf_counter() - began)
            if number < 0:
                continue
            line = {"target": name, "clients": clients, **row, "load": os.getloadavg()[0]}
            print(json.dumps(line), flush=True)
            best[name] = max(best.get(name, row), row, key=lambda one: one["tokens_per_second"])
    return best


def served_model(url: str) -> str:
    """The name of the first model that a server has."""
    from urllib.request import urlopen

    with urlopen(f"{url}/v1/models", timeout=30) as response:
        name: str = json.load(response)["data"][0]["id"]
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--bare", metavar="MODEL", help="our engine without a server, too")
    parser.add_argument("--dtype", default="bfloat16", help="of --bare")
    parser.add_argument("--numerics", default="fast", help="of --bare")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--answers", type=int, default=3, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--shared", type=int, default=384, help="tokens that all prompts share")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    options = parser.parse_args()
    targets: dict[str, Target] = {}
    if options.bare:
        targets["bare engine"] = bare_engine(
            options.bare, options.dtype, options.tokens, options.numerics
        )
    for one in options.url:
        name, _, url = one.partition("=")
        model = served_model(url)
        targets[name] = partial(ask_server, url=url, model=model, tokens=options.tokens)
    workload = Workload(options.prompt, options.shared, options.tokens)
    columns = ("tokens_per_second", "first_token_ms", "first_token_p95_ms", "between_tokens_ms")
    table = {
        clients: run(targets, workload, clients, options.answers, options.rounds)
        for clients in options.clients
    }
    print(f"{'clients':>7}  {'target':<20}", *(f"{name:>20}" for name in columns))
    for clients, best in table.items():
        for name, row in best.items():
            print(f"{clients:>7}  {name:<20}", *(f"{row[one]:>20.1f}" for one in columns))


if __name__ == "__main__":
    main()
