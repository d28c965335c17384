# SPDX-License-Identifier: Apache-2.0
"""What is refused before any handler sees a request, what is told of it, and what is asked of the
server itself."""

import asyncio
import json
import logging
import re
from typing import Annotated, Any

import pytest
from fastapi import Body
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict, Field

import meshwen
from meshwen.engine.cache_stats import CacheStats
from meshwen.engine.request import Request
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError
from meshwen.server.errors import ApiError
from meshwen.server.gate import Gate
from meshwen.server.metrics import Metrics
from meshwen.server.options import ServerOptions
from serving import PATIENCE, Call, in_loop, serving, tokenizer

JSON = {"content-type": "application/json"}


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: str
    content: str


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")
    messages: list[Message]
    top_p: float = Field(1.0, gt=0, le=1)


def with_routes(app):
    """Some handlers that fail in every way, and one that says what it got."""

    @app.post("/echo")
    async def echo(value: Annotated[Any, Body()]):
        return value

    @app.post("/v1/messages/echo")
    @app.post("/asked")
    async def asked(asked: Asked):
        return asked.messages[0].content

    @app.get("/fails/{how}")
    async def fails(how: str):
        raise {
            "api": ApiError(503, "later", code="busy", headers={"Retry-After": "9"}),
            "user": MeshwenError("temperature must be 0 or more, not -1"),
            "defect": RuntimeError("the secret of /home/user"),
        }[how]

    return app


async def post(server, content, path="/echo", headers=JSON):
    return await server.client.post(path, content=content, headers=headers)


# What is no strict JSON, and what the answer says of it.
NO_JSON = {
    "cut off": (b'{"a": 1', "not valid JSON"),
    "no JSON": (b"a=1", "not valid JSON"),
    "two values": (b"{} {}", "not valid JSON"),
    "invalid UTF-8": (b'"\xff"', "not UTF-8"),
    "overlong UTF-8": (b'"\xc0\x80"', "not UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "NaN": (b"[NaN]", "NaN"),
    "Infinity": (b"[-Infinity]", "NaN"),
    "too large a number": (b"[1e999]", "NaN"),
    "too large a number in digits": (b"[1" + b"0" * 400 + b".5]", "NaN"),
    "endless digits": (b"[" + b"1" * 5000 + b"]", "not valid JSON"),
    "a key with two values": (b'{"n": 1, "n": 2}', "n"),
    "half of a character": (b'["\\ud800"]', "half of a character"),
    "half of a character in a key": (b'{"\\udfff": 1}', "half of a character"),
    "deep": (b"[" * 101 + b"]" * 101, "deeper than 100"),
    "very deep": (b"[" * 200_000, "deeper than 100"),
    "deep objects": (b'{"a":' * 101 + b"1" + b"}" * 101, "deeper than 100"),
}


@pytest.mark.parametrize("name", NO_JSON)
@in_loop
async def test_what_is_no_strict_json_is_refused(name):
    body, words = NO_JSON[name]
    async with serving() as server:
        with_routes(server.app)
        response = await post(server, body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_json")
    assert words in error["message"]
    assert len(error["message"]) < 300


@in_loop
async def test_strict_json_reaches_its_handler_as_it_is():
    value = {"text": "\U0001f384\ud7ff NaN 1e999", "n": [1e308, -1, 2**70], "deep": [[[{}]]]}
    async with serving() as server:
        with_routes(server.app)
        for sent in (json.dumps(value), json.dumps(value, ensure_ascii=False), "[" * 99 + "]" * 99):
            response = await post(
                server, sent.encode(), headers={"content-type": "Application/JSON; charset=utf-8"}
            )
            assert response.status_code == 200
            assert response.json() == json.loads(sent)


@in_loop
async def test_only_json_that_is_not_compressed_is_read():
    async with serving() as server:
        with_routes(server.app)
        for headers in (
            {},
            {"content-type": "text/plain"},
            {"content-type": "application/x-www-form-urlencoded"},
            {"content-type": "multipart/form-data; boundary=x"},
        ):
            response = await post(server, b"{}", headers=headers)
            assert response.status_code == 415, headers
            assert "application/json" in response.json()["error"]["message"]
        for encoding in ("gzip", "br", "deflate, gzip"):
            response = await post(
                server, b"\x1f\x8b", headers={**JSON, "content-encoding": encoding}
            )
            assert response.status_code == 415, encoding
        response = await post(server, b"{}", headers={**JSON, "content-encoding": "identity"})
        assert response.status_code == 200


@in_loop
async def test_a_body_has_a_limit_whatever_it_says_of_its_length():
    async with serving(max_body_size=100) as server:
        with_routes(server.app)
        fits, longer = json.dumps("x" * 98).encode(), json.dumps("x" * 99).encode()
        assert (await post(server, fits)).status_code == 200
        assert (await post(server, longer)).status_code == 413

        async def chunks():
            for _ in range(20):
                yield b" " * 10

        assert (
            await server.client.post("/echo", content=chunks(), headers=JSON)
        ).status_code == 413
        for declared in ("101", "9" * 4400, "-1", "x", "1_0"):
            call = server.call("/echo", {}, {"content-length": declared})
            assert (await call.next())["status"] == 413, declared


@in_loop
async def test_headers_have_limits():
    async with serving() as server:
        many = {f"x-{number}": "1" for number in range(101)}
        for headers in (many, {"x-long": "x" * (32 << 10)}):
            response = await server.client.get("/health", headers=headers)
            assert response.status_code == 431


@in_loop
async def test_a_client_that_goes_before_its_request_is_whole_is_no_error(caplog):
    async with serving() as server:
        call = Call(server.app, "POST", "/echo", b"", JSON)
        call._body = None
        await call.leave()
        assert call._sent.empty()
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


KEYS = ("one-key", "another-key")


@in_loop
async def test_every_key_opens_and_nothing_else_does():
    async with serving(api_key=KEYS) as server:
        get = server.client.get
        for headers in (
            {"authorization": "Bearer one-key"},
            {"authorization": "bearer  another-key"},
            {"x-api-key": "another-key"},
            {"authorization": "Bearer wrong", "x-api-key": "one-key"},
        ):
            assert (await get("/v1/models", headers=headers)).status_code == 200, headers
        for headers in (
            {},
            {"authorization": ""},
            {"authorization": "Bearer"},
            {"authorization": "Bearer "},
            {"authorization": "one-key"},
            {"authorization": "Basic one-key"},
            {"authorization": "Bearer one-ke"},
            {"authorization": "Bearer one-keyy"},
            {"authorization": "Bearer ONE-KEY"},
            {"x-api-key": ""},
            {"x-api-key": "one-key,another-key"},
        ):
            response = await get("/v1/models", headers=headers)
            assert response.status_code == 401, headers
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert "one-key" not in response.text


@in_loop
async def test_health_the_page_and_preflights_need_no_key():
    async with serving(api_key=KEYS, allowed_origins=("https://a.example",)) as server:
        for path in ("/health", "/ping", "/", "/page/page.js"):
            assert (await server.client.get(path)).status_code == 200, path
        for path in (
            "/page/state",
            "/metrics",
            "/version",
            "/v1/models",
            "/openapi.json",
            "/health/",
        ):
            assert (await server.client.get(path)).status_code == 401, path
        preflight = {
            "origin": "https://a.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        }
        response = await server.client.options("/v1/models", headers=preflight)
        assert response.status_code == 200


def test_keys_come_from_options_a_file_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("from-file\n\n  second \nfrom-file\n")
    options = ServerOptions(api_key=["given"], api_key_file=str(file))
    found = options.api_keys({"MESHWEN_API_KEY": "from-environment"})
    assert found == ("given", "from-environment", "from-file", "second")
    assert ServerOptions().api_keys({}) == ()
    assert "given" not in repr(options)


def test_keys_that_would_open_to_all_or_cannot_be_sent_are_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.write_text("\n \n")
    for options, words in (
        (ServerOptions(api_key_file=str(empty)), "must have a key on each line, and has none"),
        (ServerOptions(api_key_file=str(tmp_path / "none")), "cannot be read"),
        (ServerOptions(api_key=("",)), "api_key must be visible ASCII"),
        (ServerOptions(api_key=("se cret",)), "api_key must be visible ASCII"),
        (ServerOptions(api_key=("s\u00e9cret",)), "api_key must be visible ASCII"),
        (ServerOptions(api_key=("x" * 1025,)), "at most 1024"),
    ):
        with pytest.raises(MeshwenError, match=words) as refused:
            options.api_keys({})
        assert "cret" not in str(refused.value)


@in_loop
async def test_other_sites_may_call_only_if_they_are_named():
    origin = {"origin": "https://a.example"}
    async with serving() as server:
        assert (
            "access-control-allow-origin"
            not in (await server.client.get("/health", headers=origin)).headers
        )
    async with serving(allowed_origins=("https://a.example",)) as server:
        response = await server.client.get("/health", headers=origin)
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        other = await server.client.get("/health", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


@in_loop
async def test_a_wrong_field_is_named_by_its_path():
    good = {"messages": [{"role": "user", "content": "hi"}]}
    async with serving() as server:
        with_routes(server.app)
        assert (await post(server, json.dumps(good), "/asked")).json() == "hi"
        for body, param, words in (
            (
                {**good, "top_p": 3},
                "top_p",
                "top_p: input should be less than or equal to 1, not 3",
            ),
            ({**good, "frob": 1}, "frob", "frob is not supported"),
            ({}, "messages", "messages is missing"),
            (
                {"messages": [{"role": "user"}]},
                "messages[0].content",
                "messages[0].content is missing",
            ),
            ({"messages": [{**good["messages"][0], "x": 1}]}, "messages[0].x", "is not supported"),
            ([], None, "the body: input should be"),
        ):
            response = await post(server, json.dumps(body), "/asked")
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, param)
            assert words in error["message"]
            assert error["type"] == "invalid_request_error"
        empty = await post(server, b"", "/asked")
        assert (empty.status_code, "body" in empty.json()["error"]["message"]) == (400, True)
        long = await post(server, json.dumps({**good, "top_p": "x" * 10_000}), "/asked")
        assert len(long.json()["error"]["message"]) < 300


@in_loop
async def test_errors_have_the_shape_of_the_path():
    async with serving(api_key=("k",)) as server:
        with_routes(server.app)
        found = await post(server, b"{}", "/v1/messages/echo")
        assert found.json() == {
            "type": "error",
            "error": {
                "type": "authentication_error",
                "message": found.json()["error"]["message"],
                "details": {"error_code": "invalid_api_key"},
            },
        }
        key = {**JSON, "x-api-key": "k"}
        for body in (b"{", b"{}"):
            found = await post(server, body, "/v1/messages/echo", key)
            assert found.json()["error"]["type"] == "invalid_request_error"
            assert found.json()["type"] == "error"
        found = await post(server, b"{}", "/v1/messages/nothing", key)
        assert found.json()["error"]["type"] == "not_found_error"


@in_loop
async def test_what_does_not_exist_is_said_so():
    async with serving() as server:
        missing = await server.client.get("/v1/nothing?key=secret")
        assert missing.status_code == 404
        assert missing.json()["error"]["message"] == "there is no path '/v1/nothing'"
        wrong = await server.client.delete("/v1/models")
        assert wrong.status_code == 405
        assert wrong.headers["allow"] == "GET"
        assert wrong.json()["error"]["message"] == "'/v1/models' does not take DELETE"


@in_loop
async def test_errors_of_handlers_are_answered_and_defects_tell_nothing(caplog):
    async with serving() as server:
        with_routes(server.app)
        busy = await server.client.get("/fails/api")
        assert (busy.status_code, busy.headers["retry-after"]) == (503, "9")
        assert busy.json()["error"]["code"] == "busy"
        user = await server.client.get("/fails/user")
        assert user.status_code == 400
        assert user.json()["error"]["message"] == "temperature must be 0 or more, not -1"
        defect = await server.client.get("/fails/defect")
    assert defect.status_code == 500
    assert defect.json()["error"]["type"] == "server_error"
    assert "secret" not in defect.text
    assert "the secret of /home/user" in caplog.text
    assert defect.headers["x-request-id"] in caplog.text


@in_loop
async def test_requests_have_ids():
    async with serving() as server:
        found = [(await server.client.get("/health")).headers["x-request-id"] for _ in range(2)]
        assert found[0] != found[1]
        given = {"x-request-id": "client.id-1"}
        assert (await server.client.get("/health", headers=given)).headers[
            "x-request-id"
        ] == "client.id-1"
        for wrong in ("a b", "x" * 129, "a;b", "\u00e9".encode("latin-1")):
            found = await server.client.get("/health", headers={"x-request-id": wrong})
            assert re.fullmatch("[0-9a-f]{24}", found.headers["x-request-id"])


@in_loop
async def test_the_log_has_a_line_for_each_request_and_nothing_that_was_said(caplog):
    caplog.set_level(logging.INFO, "meshwen.server")
    async with serving(api_key=("the-key",)) as server:
        with_routes(server.app)
        headers = {**JSON, "authorization": "Bearer the-key", "x-request-id": "number-7"}
        await post(server, b'{"prompt": "private"}', "/echo?token=private", headers)
        await server.client.get("/health")
        await server.client.get("/nope%0a%1b[31mforged", headers=headers)
        await server.client.get("/v1/models")
    lines = [one.getMessage() for one in caplog.records if one.name.endswith("request_log")]
    assert re.fullmatch(r'127\.0\.0\.1 "POST /echo" 200 0\.\d{3} s number-7', lines[0])
    assert r'"GET /nope\n\x1b[31mforged" 404' in lines[1]
    assert '"GET /v1/models" 401' in lines[2]
    assert len(lines) == 3
    assert "private" not in caplog.text
    assert "the-key" not in caplog.text


@in_loop
async def test_the_log_can_be_switched_off(caplog):
    caplog.set_level(logging.INFO, "meshwen.server")
    async with serving(access_log=False) as server:
        await server.client.get("/v1/models")
    assert not caplog.records


@in_loop
async def test_a_failing_engine_shows_in_health():
    async with serving() as server:
        for path in ("/health", "/ping"):
            found = await server.client.get(path)
            assert (found.status_code, found.json()) == (200, {"status": "ok"})
        await server.thread.close()
        found = await server.client.get("/health")
        assert (found.status_code, found.json()) == (503, {"status": "failed"})


@in_loop
async def test_the_version_and_the_fingerprint_are_told():
    async with serving() as server:
        found = (await server.client.get("/version")).json()
    assert found == {"version": meshwen.__version__, "system_fingerprint": "fp_test"}


@in_loop
async def test_models_are_listed_under_all_their_names():
    names = ("Qwen/Qwen2.5-7B-Instruct", "small")
    async with serving(served_model_name=names) as server:
        found = (await server.client.get("/v1/models")).json()
        assert found["object"] == "list"
        assert [one["id"] for one in found["data"]] == [*names]
        for one in found["data"]:
            assert one["object"] == "model"
            assert one["max_model_len"] == 1024
            assert (await server.client.get(f"/v1/models/{one['id']}")).json() == one
        other = await server.client.get("/v1/models/gpt-4")
        assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
        assert other.json()["error"]["param"] == "model"


def values(text: str) -> dict[str, float]:
    """The samples of vLLM's metrics by name, with the reason where there is one."""
    return {
        one.name
        + "".join(f" {v}" for k, v in one.labels.items() if k == "finished_reason"): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if one.name.startswith("vllm:") and "le" not in one.labels
    }


@in_loop
async def test_metrics_count_requests_and_tokens_under_the_names_that_dashboards_know():
    async with serving("one two") as server:
        sent = Request((1, 2, 3), SamplingParams(n=2))
        async with server.thread.answering(sent) as answers:
            async for _ in answers:
                pass
        async with server.thread.answering(Request((1, 2), SamplingParams(max_new_tokens=1))) as a:
            async for _ in a:
                pass
        server.engine.go.clear()
        async with server.thread.answering(Request((1,), SamplingParams(n=3))):
            pass
        found = await server.client.get("/metrics")
        assert found.headers["content-type"].startswith("text/plain")
        text, count = found.text, len(tokenizer().encode("one two")) + 1
    seen = values(text)
    assert seen["vllm:prompt_tokens_total"] == 5
    assert seen["vllm:generation_tokens_total"] == 2 * count + 1
    assert seen["vllm:request_success_total stop"] == 2
    assert seen["vllm:request_success_total length"] == 1
    assert seen["vllm:request_success_total abort"] == 3
    assert seen["vllm:request_success_total error"] == 0
    assert seen["vllm:time_to_first_token_seconds_count"] == 3
    assert seen["vllm:inter_token_latency_seconds_count"] == 2 * (count - 1)
    assert seen["vllm:e2e_request_latency_seconds_count"] == 6
    assert seen["vllm:request_queue_time_seconds_sum"] == 3 * 0.25
    assert seen["vllm:request_prefill_time_seconds_sum"] == 3 * 0.25
    assert seen["vllm:request_decode_time_seconds_sum"] == 3 * 1.0
    assert seen["vllm:num_requests_running"] == seen["vllm:num_requests_waiting"] == 0
    assert 'model_name="demo"' in text
    assert "process_resident_memory_bytes" in text


def test_metrics_of_the_cache_are_since_the_server_began():
    stats = [CacheStats(0, 40, 100, 10, 0, 1), CacheStats(10, 40, 160, 42, 0, 3)]
    engine = type("Engine", (), {"running": 4, "waiting": 7, "failures": 2})()
    metrics = Metrics("demo")
    metrics.watch(engine, lambda: stats[0])
    stats.pop(0)
    seen = values(metrics.text().decode())
    assert seen["vllm:kv_cache_usage_perc"] == 0.25
    assert seen["vllm:prefix_cache_queries_total"] == 60
    assert seen["vllm:prefix_cache_hits_total"] == 32
    assert seen["vllm:num_preemptions_total"] == 2
    assert seen["vllm:num_requests_running"] == 4
    assert seen["vllm:num_requests_waiting"] == 7


@in_loop
async def test_the_gate_is_closed_while_the_model_loads_and_when_the_server_ends():
    gate = Gate()

    async def ask(method, path):
        call = Call(gate, method, path, b"", {})
        start = await call.next()
        headers = dict(start["headers"])
        return start["status"], headers.get(b"retry-after"), json.loads(await call.rest())

    for method, path in (("GET", "/health"), ("GET", "/ping")):
        assert await ask(method, path) == (503, b"5", {"status": "loading"})
    status, retry, body = await ask("POST", "/v1/chat/completions")
    assert (status, retry, body["error"]["code"]) == (503, b"5", "loading")
    async with serving() as server:
        gate.app = server.app
        assert await ask("GET", "/health") == (200, None, {"status": "ok"})
        gate.draining = True
        assert await ask("GET", "/health") == (503, b"5", {"status": "draining"})
        status, retry, body = await ask("POST", "/v1/completions")
        assert (status, retry, body["error"]["type"]) == (503, b"5", "overloaded_error")
        status, _, body = await ask("POST", "/v1/messages")
        assert (status, body["error"]["type"]) == (503, "overloaded_error")
        assert (await ask("GET", "/v1/models"))[0] == 200


@in_loop
async def test_the_gate_knows_when_no_request_runs():
    gate, go = Gate(), asyncio.Event()

    async def app(scope, receive, send):
        await go.wait()
        raise RuntimeError

    gate.app = app
    await asyncio.wait_for(gate.idle(), PATIENCE)
    calls = [Call(gate, "GET", "/", b"", {}) for _ in range(2)]
    await asyncio.sleep(0)
    assert gate.running == 2
    go.set()
    for call in calls:
        with pytest.raises(RuntimeError):
            await call.task
    await asyncio.wait_for(gate.idle(), PATIENCE)
    assert gate.running == 0
