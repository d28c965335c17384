# SPDX-License-Identifier: Apache-2.0
"""The client of OpenAI-compatible servers: what it sends, when it tries again, and its errors."""

import json
import socket
import threading

import httpx
import pytest

from meshwen.client.chat_stream import ChatStream, events
from meshwen.client.server import RefusedError, Server
from meshwen.errors import MeshwenError

URL = "http://host:8000"
MODELS = {"object": "list", "data": [{"id": "first"}, {"id": "second"}]}
DONE = "data: [DONE]\n\n"


class Handler:
    """A server that gives these responses, in their order; the last again and again."""

    def __init__(self, *responses):
        self.responses, self.requests, self.waits = list(responses), [], []

    def __call__(self, request):
        self.requests.append(request)
        one = self.responses.pop(0) if len(self.responses) > 1 else self.responses[0]
        if isinstance(one, Exception):
            raise one
        return httpx.Response(**one) if isinstance(one, dict) else one

    def server(self, url=URL, **options):
        return Server(url, transport=httpx.MockTransport(self), wait=self.waits.append, **options)


def ok(content):
    return {"status_code": 200, "json": content}


def refused(status, message="no", **headers):
    return {"status_code": status, "json": {"error": {"message": message}}, "headers": headers}


@pytest.mark.parametrize("url", [URL, f"{URL}/", f"{URL}/v1", "host:8000", " http://host:8000/v1/"])
def test_a_url_may_end_with_the_version_or_not(url):
    handler = Handler(ok(MODELS))
    assert handler.server(url).models() == ["first", "second"]
    assert str(handler.requests[0].url) == f"{URL}/v1/models"


@pytest.mark.parametrize(
    "url", ["", "ftp://host", "http://", "http://host:99999", "http://ho st", "http://host?a=b"]
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(MeshwenError, match=r"^--url must be like http://127\.0\.0\.1:8000, not "):
        Server(url)


def test_a_key_is_sent_and_never_in_a_url():
    handler = Handler(ok(MODELS))
    handler.server(api_key="k").models()
    assert handler.requests[0].headers["authorization"] == "Bearer k"
    handler.server().models()
    assert "authorization" not in handler.requests[1].headers
    with pytest.raises(MeshwenError, match="must hold no password"):
        Server("http://me:secret@host")
    with pytest.raises(MeshwenError, match="printable ASCII"):
        Server(URL, "key\n")


def test_a_model_is_the_first_or_the_one_that_is_named():
    server = Handler(ok(MODELS)).server()
    assert server.model(None) == "first"
    assert server.model("second") == "second"
    with pytest.raises(MeshwenError, match=r"no model 'secnd' \(did you mean second\?\); it has "):
        server.model("secnd")


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_asked_again_when_it_says(status):
    busy = refused(status, **{"Retry-After": "7"})
    handler = Handler(busy, busy, ok({"a": 1}))
    assert handler.server().post("/completions", {"prompt": "x"}) == {"a": 1}
    assert handler.waits == [7.0, 7.0]
    assert {request.content for request in handler.requests} == {b'{"prompt":"x"}'}


def test_a_server_that_does_not_say_when_is_asked_ever_more_rarely():
    handler = Handler(refused(503, "full"))
    with pytest.raises(RefusedError, match="answered with status 503: full") as found:
        handler.server(tries=4).models()
    assert found.value.status == 503
    assert handler.waits == [0.5, 1.0, 2.0]
    assert len(handler.requests) == 4


def test_no_wait_is_longer_than_a_minute_and_a_date_will_do():
    handler = Handler(
        refused(503, **{"Retry-After": "86400"}),
        refused(503, **{"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        refused(503, **{"Retry-After": "soon"}),
        ok(MODELS),
    )
    handler.server(tries=4).models()
    assert handler.waits == [60.0, 0.0, 2.0]


def test_a_connection_that_breaks_off_is_made_again():
    handler = Handler(httpx.RemoteProtocolError("Server disconnected"), ok(MODELS))
    assert handler.server().models() == ["first", "second"]
    handler = Handler(httpx.ReadError("reset"))
    with pytest.raises(MeshwenError, match=f"the connection to {URL} broke off: reset"):
        handler.server(tries=2).models()
    assert len(handler.requests) == 2


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (refused(401, "no such key"), r"refuses the API key: give .*--api-key \(no such key\)"),
        ({"status_code": 403, "text": ""}, "refuses the API key: give the right one"),
        (refused(400, "a\nb"), "answered with status 400: a b$"),
        ({"status_code": 404, "text": "<html>"}, "GET /v1/models with status 404: is this an Op"),
        ({"status_code": 307, "text": ""}, "with status 307: is this an OpenAI-compatible server"),
        ({"status_code": 200, "text": "<html>"}, "not valid JSON .*: is this an OpenAI-compat"),
        (ok({"models": []}), "/v1/models: data is missing"),
        (ok({"data": []}), "has no model$"),
        (httpx.ReadTimeout("x"), "was silent for 9 s: see --timeout"),
        (httpx.ConnectTimeout("x"), "cannot connect to .*: it does not answer"),
    ],
)
def test_every_failure_is_one_line_that_says_what_to_do(response, words):
    with pytest.raises(MeshwenError, match=words) as found:
        Handler(response).server(timeout=9).models()
    assert "\n" not in str(found.value)
    assert URL in str(found.value)


def test_a_port_at_which_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(MeshwenError, match="connection refused; is the server running"):
        Server(f"http://127.0.0.1:{port}").models()


def test_an_endless_answer_is_cut(monkeypatch):
    monkeypatch.setattr("meshwen.client.server._LARGEST_ANSWER_BYTES", 1000)
    endless = httpx.Response(200, content=(b"x" * 100 for _ in range(10**6)))
    with pytest.raises(MeshwenError, match="sent more than"):
        Handler(endless).server().models()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_events_are_read_however_they_are_cut(size):
    text = (
        ': hi\r\n\r\ndata: {"a":"\u2028\x85é"}\n\nevent: x\ndata:1\ndata: 2\n\ndata: [DONE]\n\nrest'
    )
    data = text.encode()
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    assert list(events(iter(pieces))) == ['{"a":"\u2028\x85é"}', "1\n2"]


def test_a_stream_that_ends_early_is_no_whole_answer():
    with pytest.raises(MeshwenError, match="broke off before the answer was whole"):
        list(events(iter([b"data: 1\n\n"])))
    with pytest.raises(MeshwenError, match="not UTF-8"):
        list(events(iter([b"data: \xff\n\n"])))


def chunk(finish_reason=None, usage=None, **delta):
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return f"data: {json.dumps({'choices': [choice], 'usage': usage})}\n\n"


def streamed(*chunks):
    handler = Handler({"status_code": 200, "content": "".join(chunks).encode()})
    return handler, ChatStream(handler.server(), {"model": "m", "messages": []})


def test_an_answer_is_streamed():
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    last = f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
    handler, stream = streamed(
        chunk(role="assistant", content=""),
        chunk(content="He"),
        chunk("length", content="y"),
        last,
        DONE,
    )
    pieces = list(stream)
    assert [piece.text for piece in pieces] == ["", "He", "y", ""]
    assert [piece.finish_reason for piece in pieces] == [None, None, "length", None]
    assert pieces[-1].usage == usage
    body = json.loads(handler.requests[0].content)
    assert body == {
        "model": "m",
        "messages": [],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_thoughts_and_calls_are_written_as_models_write_them():
    calls = [
        {"index": 0, "id": "1", "function": {"name": "f", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"x":'}},
        {"index": 0, "function": {"arguments": " 1}"}},
        {"index": 1, "id": "2", "function": {"name": "g"}},
    ]
    _, stream = streamed(
        chunk(reasoning_content="Hm"),
        chunk(reasoning_content="m."),
        chunk(content="So."),
        *(chunk(tool_calls=[call]) for call in calls),
        chunk("tool_calls"),
        DONE,
    )
    assert "".join(piece.text for piece in stream) == (
        "<think>\nHmm.\n</think>\n\nSo."
        '\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
        '\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    )


def test_an_error_in_mid_stream_is_raised_after_what_came():
    error = f"data: {json.dumps({'error': {'message': 'the engine failed'}})}\n\n"
    _, stream = streamed(chunk(content="He"), error)
    pieces = iter(stream)
    assert next(pieces).text == "He"
    with pytest.raises(MeshwenError, match=f"{URL}: the engine failed"):
        next(pieces)


def test_whoever_waits_for_a_silent_server_can_stop():
    silent = threading.Event()

    def body():
        yield chunk(content="He").encode()
        silent.wait(20)

    handler = Handler(httpx.Response(200, content=body()))
    stream = ChatStream(handler.server(), {})
    pieces = iter(stream)
    assert next(pieces).text == "He"
    stream.close()
    assert list(pieces) == []
    silent.set()
