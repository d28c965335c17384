# SPDX-License-Identifier: Apache-2.0
"""`meshwen chat --url` and `meshwen eval gsm8k --url`: what a server is asked, and what is made of
its answers. It is one that answers by rule, without a network."""

import io
import json
import sys
import threading

import httpx
import pytest

from meshwen import demo
from meshwen.cli import main
from meshwen.cli.served import AskedServer
from meshwen.client.server import Server
from meshwen.evals.gsm8k import question
from meshwen.evals.problems import read_problems
from meshwen.evals.run_file import RunFile
from meshwen.evals.styles import STYLES
from meshwen.tokenizer.tokenizer import Tokenizer

HELD_OUT = demo.path() / "heldout.jsonl"
TOKENIZER = Tokenizer.from_folder(demo.path())
URL = "http://host:1"


class Rule:
    """A server that answers each chat by a rule, in OpenAI's form.

    Attributes:
        bodies: what it was asked, but for the tries of one token by which it is met.
        unknown: fields that it refuses.
        most: the most requests that were under way at once.
    """

    def __init__(self, answer, unknown=(), names=("demo",), finish="stop"):
        self.answer, self.unknown, self.names, self.finish = answer, set(unknown), names, finish
        self.bodies, self.keys, self.tries = [], set(), 0
        self.now = self.most = 0
        self.lock = threading.Lock()

    def __call__(self, request):
        self.keys.add(request.headers.get("authorization"))
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": name} for name in self.names]})
        body = json.loads(request.content)
        if body.get("max_tokens") == 1:
            self.tries += 1
        else:
            self.bodies.append(body)
        if unknown := self.unknown & body.keys():
            return httpx.Response(400, json={"error": {"message": f"unknown {unknown}"}})
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            text = self.answer(body)
        finally:
            with self.lock:
                self.now -= 1
        if isinstance(text, httpx.Response):
            return text
        return self.stream(text) if body.get("stream") else self.whole(body, text)

    def stream(self, text):
        chunks = [{"choices": [{"index": 0, "delta": {"content": one}}]} for one in text]
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": self.finish}]})
        chunks.append({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 7}})
        lines = [f"data: {json.dumps(one)}\n\n" for one in chunks]
        return httpx.Response(200, content="".join([*lines, "data: [DONE]\n\n"]).encode())

    def whole(self, body, text):
        ids = TOKENIZER.encode(text)
        choice = {"index": 0, "finish_reason": self.finish}
        if "messages" in body:
            prompt = TOKENIZER.encode_chat(body["messages"])
            choice["message"] = {"role": "assistant", "content": text}
            logprobs = {"content": [{"logprob": -0.5} for _ in ids]}
        else:
            prompt = TOKENIZER.encode(body["prompt"])
            choice["text"], logprobs = text, {"token_logprobs": [-0.5 for _ in ids]}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        found = {"choices": [choice], "usage": usage, "system_fingerprint": "fp"}
        if body.get("logprobs"):
            choice["logprobs"] = logprobs
        if body.get("return_token_ids"):
            choice["token_ids"] = ids
            found["prompt_token_ids"] = prompt
        return httpx.Response(200, json=found)


@pytest.fixture
def served(monkeypatch):
    """Puts a rule in the place of whatever server is asked."""

    def put(rule):
        def connect(asked):
            transport = httpx.MockTransport(rule)
            return Server(
                asked.url, asked.api_key, transport=transport, wait=lambda seconds: None, tries=2
            )

        monkeypatch.setattr(AskedServer, "connect", connect)
        return rule

    return put


@pytest.fixture
def chat(monkeypatch):
    """Runs a piped chat with these lines of input; returns its exit status."""

    def run(*lines, arguments=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return main(["chat", "--url", URL, *arguments])

    return run


def echo(body):
    return f"<{body['messages'][-1]['content']}>"


def test_a_chat_is_had_with_a_server(served, chat, capsys, tmp_path):
    rule, path = served(Rule(echo)), tmp_path / "chats.jsonl"
    assert chat("one", "two", f"/save {path}", arguments=("--system", "S")) == 0
    output = capsys.readouterr()
    assert output.out == "<one>\n<two>\n"
    assert f"model: demo at {URL}" in output.err
    said = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<one>"},
        {"role": "user", "content": "two"},
    ]
    assert [body["messages"] for body in rule.bodies] == [said[:2], said]
    assert json.loads(path.read_text())["messages"] == [
        *said,
        {"role": "assistant", "content": "<two>"},
    ]


def test_a_server_gets_what_the_user_chose_and_nothing_else(served, chat, capsys):
    rule = served(Rule(echo))
    bare = {"model", "messages", "stream", "stream_options"}
    lines = ("a", "/set temperature 0.5", "/set max_new_tokens 9", "/set stop END", "b", "/set")
    assert chat(*lines, arguments=("--seed", "7", "--top-p", "0.5")) == 0
    first, second = rule.bodies
    assert first.keys() - bare == {"seed", "top_p"}
    assert {name: second[name] for name in second.keys() - bare} == {
        "seed": 7,
        "top_p": 0.5,
        "temperature": 0.5,
        "max_tokens": 9,
        "stop": ["END"],
    }
    assert "\ntop_k null\n" in capsys.readouterr().err
    thinking = '{"enable_thinking": false}'
    assert chat("a", arguments=("--chat-template-kwargs", thinking)) == 0
    assert rule.bodies[-1]["chat_template_kwargs"] == {"enable_thinking": False}


def test_an_answer_is_made_again_without_the_last(served, chat, capsys):
    rule = served(Rule(echo))
    assert chat("one", "/retry") == 0
    assert [body["messages"] for body in rule.bodies] == [[{"role": "user", "content": "one"}]] * 2
    assert "at temperature 0" not in capsys.readouterr().err
    assert chat("one", "/retry", arguments=("--temp", "0")) == 0
    assert "at temperature 0" in capsys.readouterr().err


def test_an_answer_that_was_cut_off_says_after_how_many_tokens(served, chat, capsys):
    served(Rule(echo, finish="length"))
    assert chat("one") == 0
    assert "(cut off after 7 tokens: see --max-new-tokens" in capsys.readouterr().err


def test_what_a_server_refuses_is_one_line(served, chat, capsys):
    served(Rule(echo, unknown=("messages",)))
    assert chat("one") == 2
    assert "answered with status 400: unknown {'messages'}" in capsys.readouterr().err
    served(Rule(echo, names=("a", "b")))
    assert chat("one", arguments=("--model", "c")) == 2
    assert f"{URL} has no model 'c'; it has a, b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [(("--mesh", "1x8"), "mesh"), (("--dtype", "float32"), "dtype")],
)
def test_options_of_a_loaded_model_are_refused(served, chat, capsys, tmp_path, arguments, flag):
    served(Rule(echo))
    words = f"--{flag} is for a model that is loaded: leave it out with --url"
    assert chat("one", arguments=arguments) == 2
    assert words in capsys.readouterr().err
    out = str(tmp_path / "run.jsonl")
    assert main(["eval", "gsm8k", "--url", URL, "--out", out, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_key_is_an_option_or_in_the_environment(served, chat, monkeypatch, capsys):
    rule = served(Rule(echo))
    assert chat("one", arguments=("--api-key", "k")) == 0
    assert rule.keys == {"Bearer k"}
    rule.keys.clear()
    monkeypatch.setenv("MESHWEN_API_KEY", "e")
    assert chat("one") == 0
    assert rule.keys == {"Bearer e"}


def solve(body):
    """The right answer to each of the demo's problems but the second, as its model writes it."""
    asked = body["messages"][-1]["content"]
    for one in read_problems(HELD_OUT):
        if one.question == asked:
            return "I do not know" if one.number == 1 else f"#### {one.gold}"
    return "Hello"


def gsm8k(*options) -> int:
    return main(["eval", "gsm8k", "--url", URL, *map(str, options)])


def test_a_server_is_scored_as_a_loaded_model_is(served, tmp_path, capsys):
    rule, out = served(Rule(solve)), tmp_path / "run.jsonl"
    assert gsm8k("--out", out, "--limit", 5, "--temperature", 0, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["problems"], found["correct"]) == (5, 4)
    run = RunFile.read(out)
    assert run.settings["server"] == "fp"
    for problem in read_problems(HELD_OUT)[:5]:
        record = run.records[problem.number, 0]
        expected = question(problem, STYLES["demo"], [], TOKENIZER)
        assert record["prompt_sha256"] == expected.prompt_sha256
        assert record["prompt_tokens"] == len(expected.token_ids)
        assert record["tokens"] == TOKENIZER.encode(record["text"])
        assert record["logprob"] == -0.5 * len(record["tokens"])
    seeds = {body["seed"] for body in rule.bodies}
    assert len(seeds) == 5
    assert all(body["repetition_penalty"] == 1 and body["top_k"] == 0 for body in rule.bodies)
    assert all(body["max_tokens"] == 512 for body in rule.bodies)


def test_a_run_of_a_server_goes_on_where_it_stopped(served, tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    left = 3

    def dies(body):
        nonlocal left
        left -= 1
        return solve(body) if left >= 0 else httpx.Response(500, json={"error": {"message": "x"}})

    served(Rule(dies))
    assert gsm8k("--out", out, "--limit", 6, "--concurrency", 1) == 2
    told = capsys.readouterr().err
    assert "2 answers are saved in" in told  # One of the three was the try of one token.
    assert "answered with status 500: x" in told
    before = out.read_bytes()
    rule = served(Rule(solve))
    assert gsm8k("--out", out, "--limit", 6, "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out)["answers_from_before"] == 2
    assert out.read_bytes().startswith(before)
    assert len(rule.bodies) == 4


def test_requests_are_under_way_together_up_to_the_number_asked_for(served, tmp_path):
    together = threading.Barrier(3, timeout=20)

    def waits(body):
        if body["max_tokens"] > 1:
            together.wait()
        return solve(body)

    rule = served(Rule(waits))
    assert gsm8k("--out", tmp_path / "run.jsonl", "--limit", 6, "--concurrency", 3) == 0
    assert rule.most == 3


def test_a_server_that_takes_openais_fields_alone_is_compared_by_texts(served, tmp_path, capsys):
    told, plain = tmp_path / "told.jsonl", tmp_path / "plain.jsonl"
    served(Rule(solve))
    assert gsm8k("--out", told, "--limit", 4) == 0
    beyond = ("return_token_ids", "repetition_penalty", "top_k", "min_p")
    rule = served(Rule(solve, unknown=beyond))
    assert gsm8k("--out", plain, "--limit", 4) == 0
    assert rule.tries == 2
    assert "does not tell the ids of tokens" in capsys.readouterr().err
    assert RunFile.read(plain).records[0, 0]["logprob"] < 0
    compare = ["eval", "compare", str(told), str(plain), "--require", "identical"]
    assert main([*compare, "--html", str(tmp_path / "r.html")]) == 0
    assert "identical answers: 4 of 4" in capsys.readouterr().out
    served(Rule(lambda body: solve(body).replace("####", "#### "), unknown=("logprobs", *beyond)))
    assert gsm8k("--out", tmp_path / "other.jsonl", "--limit", 4) == 0
    capsys.readouterr()
    compare[3] = str(tmp_path / "other.jsonl")
    assert main(compare) == 1
    assert "in problem 0 from 5" in capsys.readouterr().out


def test_a_prompt_that_is_too_long_fails_alone(served, tmp_path, capsys):
    questions = [one.question for one in read_problems(HELD_OUT)]

    def refuses(body):
        if body["messages"][-1]["content"] != questions[1]:
            return solve(body)
        return httpx.Response(400, json={"error": {"message": "too long"}})

    served(Rule(refuses))
    assert gsm8k("--out", tmp_path / "run.jsonl", "--limit", 3, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["failed"], found["correct"]) == ([1], 2)


def test_a_style_without_a_conversation_asks_for_completions(served, tmp_path, capsys):
    rule = served(Rule(lambda body: " It is 5", names=("other",)))
    style = ("--prompt-style", "lm-eval-cot-zeroshot")
    assert gsm8k("--out", tmp_path / "r", "--data", HELD_OUT, "--limit", 1, *style) == 0
    first = read_problems(HELD_OUT)[0].question
    assert rule.bodies[0]["prompt"] == f"Q: {first}\nA: Let's think step by step."
    assert rule.bodies[0]["stop"] == ["Q:", "</s>", "<|im_end|>"]
    assert rule.bodies[0]["model"] == "other"
    assert RunFile.read(tmp_path / "r").records[0, 0]["extracted"] == "5"
