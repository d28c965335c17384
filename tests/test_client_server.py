# SPDX-License-Identifier: Apache-2.0
"""The client against meshwen's own server, over a scripted engine and real sockets."""

import json
import time

import pytest

from loopback import PausingEngine, on_loopback
from meshwen import demo
from meshwen.cli import main
from meshwen.client.chat_stream import ChatStream
from meshwen.client.server import Server
from meshwen.errors import MeshwenError
from meshwen.evals.problems import read_problems
from meshwen.evals.run_file import RunFile
from serving import EOS, PATIENCE, tokenizer

HELD_OUT = demo.path() / "heldout.jsonl"
HI = [{"role": "user", "content": "Hi"}]


def test_an_answer_is_streamed_and_counted():
    with on_loopback("Grüße!\n\nWie geht's?") as (url, _):
        stream = ChatStream(Server(url), {"model": "demo", "messages": HI, "temperature": 0})
        pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == "Grüße!\n\nWie geht's?"
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]
    usage = pieces[-1].usage
    assert usage["prompt_tokens"] == len(tokenizer().encode_chat(HI))
    assert usage["completion_tokens"] == len(tokenizer().encode("Grüße!\n\nWie geht's?")) + 1


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_answer_that_nobody_waits_for_any_more_is_cancelled():
    engine = PausingEngine("one two three four five six", steps=2)
    with on_loopback(engine) as (url, server):
        stream = ChatStream(Server(url), {"model": "demo", "messages": HI})
        pieces = iter(stream)
        assert next(pieces) is not None
        wait_until(lambda: not engine.go.is_set())
        stream.close()  # The server is silent now, and hears of it all the same.
        wait_until(lambda: server.thread.running == 0)
        engine.go.set()
        wait_until(lambda: engine.cancelled)
    assert engine.steps <= 3


def test_keys_models_and_fields_are_refused_in_one_line():
    with on_loopback(api_key=("k",)) as (url, _):
        with pytest.raises(MeshwenError, match="refuses the API key: give the right one with --ap"):
            Server(url, "wrong").models()
        server = Server(url, "k")
        assert server.model(None) == "demo"
        with pytest.raises(MeshwenError, match=r"has no model 'dem' \(did you mean demo\?\)"):
            server.model("dem")
        body = {"model": "demo", "messages": HI, "modalities": ["audio"]}
        with pytest.raises(MeshwenError, match="answered with status 400: modalities"):
            server.post("/chat/completions", body)


def solved(request, choice):
    """The answer to each of the demo's problems."""
    text = tokenizer().decode(request.prompt_tokens)
    for one in read_problems(HELD_OUT):
        if one.question in text:
            return f"#### {one.gold}"
    return "Hello"


@pytest.mark.parametrize("style", ["demo", "lm-eval-cot-zeroshot"])
def test_a_run_of_the_server_has_its_tokens(tmp_path, capsys, style):
    out = tmp_path / "run.jsonl"
    with on_loopback(solved) as (url, server):
        arguments = ["--out", str(out), "--limit", "4", "--json", "--prompt-style", style]
        assert main(["eval", "gsm8k", "--url", url, *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["correct"] == 4
    records = RunFile.read(out).records
    asked = {request.prompt_tokens for request in server.engine.requests}
    for number, problem in enumerate(read_problems(HELD_OUT)[:4]):
        record = records[number, 0]
        assert record["tokens"] == [*tokenizer().encode(f"#### {problem.gold}"), EOS]
        assert record["prompt_tokens"] in {len(prompt) for prompt in asked}
        assert record["logprob"] < 0
    assert all(request.sampling.logprobs for request in server.engine.requests)
    assert len({request.sampling.seed for request in server.engine.requests}) >= 4
