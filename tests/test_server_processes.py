# SPDX-License-Identifier: Apache-2.0
"""A server over two processes: process 0 has the clients, and the other does what it does."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from processes import LIMIT, command, free_port

QUESTION = "Maya buys 4 books at $7 each and pays with $50. How much change does she get?"
ANSWER = "4*7=28 dollars\n50-28=22 dollars back\n#### 22"
START = 150  # seconds to load and to compile, beside other tests

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unoptimised")]


@contextmanager
def two_processes():
    """A client of a server of the demo model, its two processes, and what these print."""
    port, coordinator = free_port(), free_port()
    own = ("--mesh", "1x2", "--port", port, "--no-warmup")
    started = [command("serve", coordinator, index, *own) for index in range(2)]
    with ThreadPoolExecutor() as threads:  # A pipe that nobody reads would stop who writes.
        printed = [threads.submit(process.communicate) for process in started]
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, started)
            with httpx.Client(base_url=url, timeout=START, trust_env=False) as client:
                yield client, started, printed
        finally:
            for process in started:
                process.kill()


def wait_until_ready(url, started):
    for _ in range(2 * START):
        assert all(process.poll() is None for process in started)
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    pytest.fail("the server did not get ready")


def ask(client):
    messages = [{"role": "user", "content": QUESTION}]
    reply = client.post("/v1/chat/completions", json={"messages": messages, "temperature": 0})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def test_both_processes_answer_together_whoever_comes_and_goes():
    with two_processes() as (client, (first, other), printed):
        assert ask(client) == ANSWER
        long = {"prompt": "1", "max_tokens": 900, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=long) as reply:
            assert next(reply.iter_lines())  # Then its client goes away.
        assert client.post("/v1/completions", json={"prompt": [9999]}).status_code == 400
        assert ask(client) == ANSWER
        first.send_signal(signal.SIGTERM)
        _, errors = printed[0].result(timeout=LIMIT)
        assert first.returncode == 0, errors
        assert errors.endswith("stopped\n")
        out, _ = printed[1].result(timeout=LIMIT)  # XLA may print notes of programs that it kept.
        assert (other.returncode, out) == (0, "")


def test_a_lost_process_ends_the_server():
    with two_processes() as (client, (first, other), printed):
        assert ask(client) == ANSWER
        other.kill()
        printed[0].result(timeout=LIMIT)
        assert first.returncode != 0
