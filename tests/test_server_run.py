# SPDX-License-Identifier: Apache-2.0
"""The server's life, over real sockets: loading, answering, ending; the model is a script."""

import asyncio
import json
import socket
import threading
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace

import httpx
import pytest

from meshwen.engine.cache_stats import CacheStats
from meshwen.errors import MeshwenError
from meshwen.server.options import ServerOptions
from meshwen.server.run import Loaded, ModelServer
from serving import MAX_MODEL_LEN, PATIENCE, ScriptedEngine, config, in_loop, tokenizer

LONG = {"prompt": "Hi", "max_tokens": 900, "model": "demo"}


def loaded(engine: ScriptedEngine) -> Loaded:
    engine.cache_plan = SimpleNamespace(max_num_seqs=engine.slots)
    engine.max_model_len = MAX_MODEL_LEN
    engine.cache_stats = CacheStats(0, 1, 0, 0, 0, 0)
    model = SimpleNamespace(
        engine=engine,
        mesh=SimpleNamespace(is_multi_process=False),
        tokenizer=tokenizer(),
        config=config(),
        generation_config={},
    )
    return Loaded(model, "fp_test", None)


class Life:
    """A server in a thread of its own.

    Attributes:
        lines: what it says.
        engine: that gives the answers.
        load: set, for the model to be loaded.
        url: where it listens.
    """

    def __init__(self, load=None, script="Hello!", **options):
        self.lines, self.load, self._listens = [], threading.Event(), threading.Event()
        self.engine = ScriptedEngine(script)
        self._make = load or (lambda: loaded(self.engine))
        self.server = ModelServer(
            ServerOptions(**{"port": 0, **options}), "demo", self._load, self._say
        )
        self.ended = asyncio.create_task(asyncio.to_thread(self.server.run))

    def _load(self):
        assert self.load.wait(PATIENCE)
        return self._make()

    def _say(self, line):
        self.lines.append(line)
        self._listens.set()

    async def client(self, **more) -> httpx.AsyncClient:
        assert await asyncio.to_thread(self._listens.wait, PATIENCE)
        self.url = self.lines[0].split()[2].rstrip(",")
        more.setdefault("base_url", self.url)
        return httpx.AsyncClient(timeout=PATIENCE, **more)

    async def end(self) -> bool:
        self.server.stop()
        return await asyncio.wait_for(self.ended, PATIENCE)


@asynccontextmanager
async def living(load=None, script="Hello!", **options):
    life = Life(load, script, **options)
    try:
        yield life
    finally:
        life.load.set()
        life.engine.go.set()
        await life.end()


async def until_ready(client) -> None:
    async with asyncio.timeout(PATIENCE):
        while (await client.get("/health")).status_code != 200:
            await asyncio.sleep(0.01)


@in_loop
async def test_health_tells_of_loading_then_of_readiness():
    async with living() as life, await life.client() as client:
        assert life.lines == [f"listening at {life.url}, loading demo"]
        health = await client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        asked = await client.post("/v1/completions", json={"prompt": "Hi"})
        assert (asked.status_code, asked.headers["retry-after"]) == (503, "5")
        life.load.set()
        await until_ready(client)
        answer = (await client.post("/v1/completions", json={"prompt": "Hi"})).json()
        assert answer["choices"][0]["text"] == "Hello!"
        assert answer["system_fingerprint"] == "fp_test"
        assert life.lines[1].startswith(f"ready at {life.url} after ")
        assert await life.end()
    assert life.lines[-1] == "stopped"


@in_loop
async def test_what_is_wrong_with_a_model_ends_the_server_with_that_error():
    def fail():
        raise MeshwenError("there is no room for the weights")

    life = Life(fail)
    life.load.set()
    with pytest.raises(MeshwenError, match="there is no room for the weights"):
        await asyncio.wait_for(life.ended, PATIENCE)


@in_loop
async def test_it_can_be_stopped_while_it_loads():
    async with living() as life, await life.client():
        assert not await life.end()


@in_loop
async def test_running_requests_finish_and_new_ones_are_refused_when_it_ends():
    async with living(script="word " * 100) as life, await life.client() as client:
        life.load.set()
        await until_ready(client)
        life.engine.pause = 0.001
        async with client.stream(
            "POST", "/v1/completions", json={**LONG, "stream": True}
        ) as stream:
            lines = stream.aiter_lines()
            got = [await anext(lines)]
            life.engine.go.clear()
            life.server.stop()
            async with asyncio.timeout(PATIENCE):
                while (health := await client.get("/health")).status_code == 200:
                    await asyncio.sleep(0.01)
            assert health.json() == {"status": "draining"}
            refused = await client.post("/v1/completions", json={"prompt": "Hi"})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            assert (await client.get("/metrics")).status_code == 200
            life.engine.go.set()
            got += [line async for line in lines if line]
        assert await asyncio.wait_for(life.ended, PATIENCE)
    assert got[-1] == "data: [DONE]"
    text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in got[:-1] if line)
    assert text == "word " * 100
    with pytest.raises(httpx.ConnectError):
        await httpx.AsyncClient().get(life.url)


@in_loop
async def test_an_idle_server_ends_in_no_time():
    async with living(shutdown_timeout=0) as life, await life.client() as client:
        life.load.set()
        await until_ready(client)
        assert await life.end()


@in_loop
async def test_requests_that_do_not_finish_in_time_are_cut_off_with_an_error():
    async with (
        living(script="word " * 400, shutdown_timeout=0.05) as life,
        await life.client() as client,
    ):
        life.load.set()
        await until_ready(client)
        life.engine.pause = 0.02
        whole = asyncio.create_task(client.post("/v1/completions", json=LONG))
        async with client.stream(
            "POST", "/v1/completions", json={**LONG, "stream": True}
        ) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            assert not await life.end()
            got = [line async for line in lines if line]
        assert any("shutting down" in line for line in got)
        assert (await whole).status_code == 503
    assert life.lines[-2] == "stopping: requests that have not finished (2) are cut off"


@pytest.mark.parametrize("stream", [True, False])
@in_loop
async def test_a_client_that_vanishes_ends_its_request(stream):
    async with living(script="word " * 400) as life, await life.client() as client:
        life.load.set()
        await until_ready(client)
        life.engine.pause = 0.002
        _, writer = await asyncio.open_connection(*life.url.rpartition("/")[2].split(":"))
        body = json.dumps({**LONG, "stream": stream}).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        async with asyncio.timeout(PATIENCE):
            while life.engine.steps < 3:
                await asyncio.sleep(0.001)
            writer.close()
            while not life.engine.cancelled:
                await asyncio.sleep(0.001)
        assert life.engine.steps < 400
        assert not life.engine.busy


@in_loop
async def test_of_many_clients_none_is_lost_and_those_that_vanish_leave_nothing_behind():
    async with living(script="word " * 30, max_queue=1000) as life, await life.client() as client:
        life.load.set()
        await until_ready(client)
        host, port = life.url.rpartition("/")[2].split(":")

        async def ask(number: int) -> bytes:
            """Asks, and goes away: at once, in mid-stream, without a word, or never."""
            body = json.dumps({**LONG, "stream": bool(number % 2)}).encode()
            reader, writer = await asyncio.open_connection(host, port)
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
            way = number % 5
            writer.write(head + (body[:10] if way == 1 else body))
            got = b""
            if way in (0, 3):
                got = await asyncio.wait_for(reader.read(), PATIENCE)
            elif way == 4:
                got = await asyncio.wait_for(reader.read(300), PATIENCE)
            writer.close()
            return got

        found = await asyncio.gather(*(ask(number) for number in range(150)))
        async with asyncio.timeout(PATIENCE):
            while life.server._gate.running or life.engine.busy:
                await asyncio.sleep(0.01)
        whole = [got for number, got in enumerate(found) if number % 5 in (0, 3)]
        assert [got.count(b'"finish_reason":"length"') for got in whole] == [0] * 60
        assert [got.count(b'"finish_reason":"stop"') for got in whole] == [1] * 60
        metrics = (await client.get("/metrics")).text
        for name in ("num_requests_running", "num_requests_waiting", "engine_failures_total"):
            assert f'vllm:{name}{{engine="0",model_name="demo"}} 0.0' in metrics, name


@in_loop
async def test_behind_a_proxy_that_serves_it_under_a_path_all_is_as_elsewhere():
    async with (
        living(root_path="/llm", api_key=("the-key",)) as life,
        await life.client() as client,
    ):
        assert (await client.get("/health")).json() == {"status": "loading"}
        life.load.set()
        await until_ready(client)
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/page/state")).status_code == 401
        found = await client.post("/v1/messages", json={})
        assert (found.status_code, found.json()["type"]) == (401, "error")
        key = {"x-api-key": "the-key"}
        found = await client.post("/v1/completions", json={"prompt": "Hi"}, headers=key)
        assert found.json()["choices"][0]["text"] == "Hello!"
        found = await client.get("/nothing", headers=key)
        assert found.json()["error"]["message"] == "there is no path '/nothing'"


@in_loop
async def test_a_unix_socket_is_made_and_removed_and_one_left_over_is_replaced(tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    async with (
        living(uds=str(path)) as life,
        await life.client(transport=transport, base_url="http://x") as client,
    ):
        life.load.set()
        await until_ready(client)
        assert life.url == f"unix:{path}"
        assert path.stat().st_mode & 0o777 == 0o660
        with pytest.raises(
            MeshwenError, match=r"uds .*socket cannot be listened at: Address already in use"
        ):
            await asyncio.to_thread(
                ModelServer(ServerOptions(uds=str(path)), "demo", life._load, print).run
            )
    assert not path.exists()


@in_loop
async def test_an_address_that_cannot_be_had_is_an_error_before_anything_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for options, words in (
            ({"port": port}, f"cannot listen at 127.0.0.1:{port}: .*; give another --port"),
            ({"host": "192.0.2.1"}, "cannot listen at 192.0.2.1:0"),
            ({"host": "no such host"}, "host must be an address, not 'no such host'"),
            ({"ssl_certfile": "/nothing.pem"}, "the certificate cannot be used"),
        ):
            life = Life(**options)
            with pytest.raises(MeshwenError, match=words):
                await asyncio.wait_for(life.ended, PATIENCE)


@in_loop
async def test_headers_beyond_all_measure_cut_the_connection():
    async with living() as life, await life.client() as client:
        life.load.set()
        await until_ready(client)
        found = await client.get("/health", headers={"x": "y" * (50 << 10)})
        assert found.status_code == 431
        reader, writer = await asyncio.open_connection(*life.url.rpartition("/")[2].split(":"))
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * (200 << 10))
        with suppress(ConnectionResetError):
            answer = await asyncio.wait_for(reader.read(), PATIENCE)
            assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
        writer.close()
