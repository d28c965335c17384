# SPDX-License-Identifier: Apache-2.0
"""`meshwen chat`: turns, commands, and Ctrl-C, on a checkpoint whose answer is known."""

import io
import json
import signal
import subprocess
import sys
import time

import pytest

from meshwen.cli import chat as chat_module
from meshwen.cli import main
from speller import ANSWER, CONTEXT, load_once, write_speller

pytestmark = pytest.mark.usefixtures("unoptimised")
load_model = load_once()


@pytest.fixture(autouse=True)
def _models_are_loaded_once(monkeypatch):
    monkeypatch.setattr("meshwen.cli.chat.load_model", load_model)


@pytest.fixture(scope="module")
def speller(tmp_path_factory):
    return str(write_speller(tmp_path_factory.mktemp("models") / "speller"))


@pytest.fixture
def chat(speller, monkeypatch):
    """Runs a piped chat with these lines of input; returns its exit status."""

    def run(*lines, arguments=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return main(["chat", "--model", speller, *arguments])

    return run


def said(*messages):
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def saved(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_turns_are_remembered_saved_and_taken_up_again(chat, capsys, tmp_path):
    path = tmp_path / "chats.jsonl"
    assert chat("one", "", "//two", f"/save {path}", "/quit", "never") == 0
    assert capsys.readouterr().out == f"{ANSWER}\n{ANSWER}\n"
    first = [("user", "one"), ("assistant", ANSWER), ("user", "/two"), ("assistant", ANSWER)]
    assert saved(path) == [said(*first)]
    assert chat("/system S", f"/save {path}", arguments=("--load", str(path))) == 0
    assert saved(path)[1] == said(("system", "S"), *first)


def test_tools_of_a_loaded_conversation_stay(chat, capsys, tmp_path):
    path = tmp_path / "chats.jsonl"
    tools = {"tools": [{"name": "t"}]}
    path.write_text(json.dumps(said(("user", "one"), ("assistant", "1")) | tools | {"id": 1}))
    assert chat(f"/save {path}b", "/system \udc80", arguments=("--load", str(path))) == 2
    (found,) = saved(tmp_path / "chats.jsonlb")
    assert found["tools"] == tools["tools"]
    told = capsys.readouterr().err
    assert "change nothing: 'id'" in told
    assert r'the system message "\udc80" is not valid Unicode' in told


def test_reset_keeps_the_system_message(chat, capsys, tmp_path):
    path = tmp_path / "chats.jsonl"
    lines = ("one", "/reset", "two", f"/save {path}", "/system", f"/save {path}")
    assert chat(*lines, arguments=("--system", "S", "--max-new-tokens", "2")) == 0
    last = [("user", "two"), ("assistant", ANSWER[:2])]
    assert saved(path) == [said(("system", "S"), *last), said(*last)]
    assert "cut off after 2 tokens: see --max-new-tokens" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_keeps_what_came(chat, capsys, monkeypatch, tmp_path):
    path = tmp_path / "chats.jsonl"
    written = []
    before = signal.getsignal(signal.SIGINT)

    def write(text):
        written.append(text)
        if text == "i":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys.stdout, "write", write)
    assert chat("one", f"/save {path}") == 0
    assert saved(path) == [said(("user", "one"), ("assistant", "Hi"))]
    assert "".join(written) == "Hi\n"
    assert "(stopped)" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_the_program_whatever_it_is_busy_with():
    script = (
        "import hashlib\n"
        "from meshwen.cli.interrupt import ctrl_c\n"
        "with ctrl_c():\n"
        "    print('busy', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"  # Minutes within one C call.
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"busy\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    finally:
        process.kill()
        process.communicate()


def test_a_closed_stdin_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat"]) == 2
    assert "stdin is closed" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused_before_its_weights_are_made(capsys, monkeypatch):
    monkeypatch.setattr(chat_module, "load_model", None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    assert main(["chat", "--model", "qwen2.5-7b", "--load-format", "dummy"]) == 2
    assert "no tokenizer, so it cannot chat" in capsys.readouterr().err


every_limit = pytest.mark.parametrize(
    ("limit", "arguments"), [(CONTEXT, ()), (90, ("--max-model-len", "90"))]
)


@every_limit
def test_a_conversation_beyond_the_context_is_refused_and_stays(
    limit, arguments, chat, capsys, tmp_path
):
    path = tmp_path / "chats.jsonl"
    assert chat("one", "x" * limit, f"/save {path}", arguments=arguments) == 2
    output = capsys.readouterr()
    assert output.out == f"{ANSWER}\n"
    assert "begin anew with /reset" in output.err.splitlines()[-1]
    assert not path.exists()


@every_limit
def test_an_answer_that_the_context_cuts_off_says_so(limit, arguments, chat, capsys):
    # The template takes 27 tokens around a user's message; this leaves room for 3 more.
    assert chat("x" * (limit - 27 + 8 - 3), arguments=arguments) == 0
    output = capsys.readouterr()
    assert output.out == f"{ANSWER[:3]}\n"
    assert "(the model's context is full: /reset begins anew)" in output.err


def test_a_terminal_survives_errors_and_gets_help(chat, capsys, monkeypatch):
    lines = iter(["/help", "/frob", "/save", "one"])
    monkeypatch.setattr(chat_module, "_terminal_lines", lambda: lines)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(io, "StringIO", lambda text: terminal)
    assert chat() == 0
    output = capsys.readouterr()
    assert output.out == f"{ANSWER}\n"
    for text in ("/system TEXT", "no command /frob", "/save needs the name of a file"):
        assert text in output.err
