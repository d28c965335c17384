# SPDX-License-Identifier: Apache-2.0
"""Load on a server: many connections, some of them slow, half open, or gone before their answer.

    python scripts/serve_load.py [--connections 1000] [--requests 10000] [--url http://HOST:PORT]

Without --url it starts `meshwen serve --model demo` and ends it. Each request is about token ids
that no other has, and its answer must show them: what is lost, comes twice, or is another's, is
counted. Prints a table, with the memory of the server before and after (Linux). Exit status 1
where an answer was lost or doubled, the server failed, or it has something unfinished at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from raw_http import Connection, Response, fetch

VOCABULARY = 1000  # Token ids below are in every model's.
START_SECONDS, ANSWER_SECONDS, REST_SECONDS = 600.0, 300.0, 60.0
SETTLE = 500  # Requests before memory is first looked at: what is made once is there then.
BROKEN = (OSError, EOFError, ValueError, IndexError, KeyError)


class Load:
    """Sends requests and counts what becomes of them.

    Args:
        url: of the server.
        requests: how many to send.
        leaving: the share of those whose client goes away.
        slow: the share of streams that are read slowly.
    """

    def __init__(self, url: str, requests: int, leaving: float = 0.1, slow: float = 0.02):
        self._url, self._numbers = url, iter(range(requests))
        self._leaving, self._slow = leaving, slow
        self.counts: Counter[str] = Counter()
        self._ids: set[str] = set()

    async def run(self, connections: int) -> None:
        """Sends all over as many connections, which are kept where nobody leaves."""
        await asyncio.gather(*(self._client(number) for number in range(connections)))

    async def _client(self, number: int) -> None:
        draw, connection = random.Random(number), Connection(self._url)
        for request in self._numbers:
            try:
                await asyncio.wait_for(self._one(connection, request, draw), ANSWER_SECONDS)
            except (*BROKEN, TimeoutError) as error:
                self.counts["lost"] += 1
                self.counts[f"lost: {type(error).__name__} {error}"[:80]] += 1
                connection.close()
        connection.close()

    async def _one(self, connection: Connection, number: int, draw: random.Random) -> None:
        body = _body(number, draw)
        headers = {"X-Request-Id": f"load-{number}"}
        if draw.random() < self._leaving:
            await self._leave(connection, body, headers, draw)
            return
        while True:
            await connection.send("/v1/completions", body, headers)
            slow = body["stream"] and draw.random() < self._slow
            response = await connection.receive(0.05 if slow else 0.0)
            if response.status != 503:
                break
            self.counts["refused for now (503)"] += 1
            await asyncio.sleep(float(response.headers["retry-after"]) * draw.random())
        self._check(response, body, headers["X-Request-Id"])
        self.counts["read slowly"] += slow
        if draw.random() < 0.05 and await connection.surplus():
            self.counts["doubled"] += 1

    async def _leave(
        self, connection: Connection, body: Any, headers: dict[str, str], draw: random.Random
    ) -> None:
        """Goes away within the request, right after it, or within its answer."""
        upto = draw.choice((-1, -1, 20, 150))
        await connection.send("/v1/completions", body, headers, upto)
        if upto < 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(connection.receive(), draw.random() / 4)
        connection.close()
        self.counts["left"] += 1

    def _check(self, response: Response, body: dict[str, Any], number: str) -> None:
        """Whether the answer is that of the request, whole, and not another's."""
        self.counts[f"status {response.status}"] += 1
        if response.status != 200:
            self.counts["lost"] += 1
            return
        texts = [response.body.decode()]
        if body["stream"]:
            events = texts[0].strip().split("\n\n")  # Comments keep a connection that waits.
            *texts, last = [one[len("data: ") :] for one in events if not one.startswith(":")]
            self.counts["lost"] += last != "[DONE]"
        parts = [json.loads(text) for text in texts]
        choices = [one for part in parts for one in part["choices"]]
        prompts = [one["prompt_token_ids"] for one in choices if "prompt_token_ids" in one]
        tokens = [token for one in choices for token in one.get("token_ids", [])]
        ends = [one for one in choices if one["finish_reason"]]
        right = prompts == [body["prompt"]] and len(tokens) == body["max_tokens"] and len(ends) == 1
        self.counts["another's, or not whole"] += not right
        self.counts["another's, or not whole"] += response.headers["x-request-id"] != number
        self.counts["doubled"] += parts[0]["id"] in self._ids
        self._ids.add(parts[0]["id"])


def _body(number: int, draw: random.Random) -> dict[str, Any]:
    digits = [number % VOCABULARY, number // VOCABULARY]
    return {
        "prompt": [7] * draw.choice((1, 4, 40)) + digits,
        "max_tokens": draw.choice((1, 4, 8)),
        "temperature": draw.choice((0, 1)),
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": draw.random() < 0.5,
    }


@asynccontextmanager
async def half_open(url: str, count: int) -> AsyncIterator[None]:
    """Connections that say a part of a request, or nothing, and stay."""
    kept = [Connection(url) for _ in range(count)]
    for number, one in enumerate(kept):
        await one.send("/v1/completions", {"prompt": "x"}, {}, (0, 10, 60, 110)[number % 4])
    try:
        yield
    finally:
        for one in kept:
            one.close()


async def metrics(url: str) -> dict[str, float]:
    """The server's metrics by their names, summed over labels."""
    found: Counter[str] = Counter()
    for line in (await fetch(url, "/metrics")).body.decode().splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name.partition("{")[0]] += float(value)
    return found


async def at_rest(url: str) -> dict[str, float]:
    """The metrics, once nothing runs or waits; or as they are when that took too long."""
    end = time.monotonic() + REST_SECONDS
    while True:
        found = await metrics(url)
        unfinished = found["vllm:num_requests_running"] + found["vllm:num_requests_waiting"]
        if not unfinished or time.monotonic() > end:
            return found
        await asyncio.sleep(0.2)


def start(arguments: list[str]) -> tuple[subprocess.Popen[bytes], str]:
    """Starts a server of the demo model; returns it with its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "meshwen", "serve", "--model", "demo", "--port", str(port)]
    server = subprocess.Popen([*command, "--no-access-log", *arguments])
    return server, f"http://127.0.0.1:{port}"


def stop(server: subprocess.Popen[bytes] | None) -> None:
    """Ends a server that was started."""
    if server is not None:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


async def healthy(url: str, server: subprocess.Popen[bytes] | None) -> None:
    """Waits until the server answers."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and (server is None or server.poll() is None):
        with suppress(*BROKEN, TimeoutError):
            if (await fetch(url, "/health", seconds=5)).status == 200:
                return
        await asyncio.sleep(0.5)
    sys.exit("the server has not become healthy")


def megabytes(server: subprocess.Popen[bytes] | None) -> float:
    """Of the server's resident memory; 0 where it cannot be known."""
    status = Path(f"/proc/{server.pid}/status") if server else Path("none")
    if not status.is_file():
        return 0.0
    line = next(one for one in status.read_text().splitlines() if one.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


async def run(options: argparse.Namespace, url: str, server: Any) -> bool:
    """Puts the load on, prints what came of it; whether all is well."""
    await healthy(url, server)
    settle = Load(url, SETTLE)
    await settle.run(min(options.connections, SETTLE))
    before, memory = await at_rest(url), megabytes(server)
    load, began = Load(url, options.requests), time.monotonic()
    async with half_open(url, options.half_open):
        await load.run(options.connections)
        seconds = time.monotonic() - began
        after = await at_rest(url)
    health = await fetch(url, "/health")
    unfinished = after["vllm:num_requests_running"] + after["vllm:num_requests_waiting"]
    failures = after["vllm:engine_failures_total"] - before["vllm:engine_failures_total"]
    rows = {
        "requests": options.requests,
        "connections at once": options.connections,
        "half-open connections": options.half_open,
        "seconds": round(seconds, 1),
        "requests a second": round(options.requests / seconds, 1),
        **dict(sorted(load.counts.items())),
        "engine failures": int(failures),
        "unfinished at the end": int(unfinished),
        "server's memory before, MB": round(memory, 1),
        "server's memory after, MB": round(megabytes(server), 1),
    }
    for name, value in rows.items():
        print(f"{name:<60} {value:>10}")
    wrong = sum(load.counts[name] for name in ("lost", "doubled", "another's, or not whole"))
    broken = sum(n for name, n in load.counts.items() if name.startswith("status 5"))
    return not (wrong or broken or failures or unfinished) and health.status == 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a server that runs; default: start one")
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--half-open", type=int, default=50)
    options, further = parser.parse_known_args()
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = options.connections + options.half_open + 200
    if needed > most:
        sys.exit(f"{needed} open files are needed, and {most} are allowed (ulimit -n)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(least, needed), most))
    server, url = (None, options.url) if options.url else start(further)
    try:
        well = asyncio.run(run(options, url, server))
    finally:
        stop(server)
    sys.exit(not well)


if __name__ == "__main__":
    main()
