# SPDX-License-Identifier: Apache-2.0
"""`meshwen chat`: turns, commands, and Ctrl-C, on a checkpoint whose answer is known."""

import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from meshwen import Qwen2ForCausalLM
from meshwen.cli import chat as chat_module
from meshwen.cli import main
from meshwen.cli.conversation import LoadedConversation
from meshwen.cli.terminal_input import CommandCompleter, typed_turns
from meshwen.engine.request import Completion, Event, Timings
from meshwen.engine.runner import ModelRunner
from meshwen.engine.sampling import NO_TOKEN
from meshwen.engine.sampling_params import SamplingParams
from meshwen.engine.stream import Stream
from meshwen.tokenizer.tokenizer import Tokenizer
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


def test_a_chat_begins_with_a_saved_prefix(chat, speller, tmp_path, capsys):
    file, system = tmp_path / "file", "y" * 64
    model = Qwen2ForCausalLM.from_pretrained(speller, dtype="float32")
    assert model.save_prefix(file, [{"role": "system", "content": system}]) == 64
    arguments = ["--dtype", "float32", "--load-prefix", str(file)]
    assert chat("hi", arguments=["--system", system, *arguments]) == 0
    output = capsys.readouterr()
    assert output.out == f"{ANSWER}\n"
    assert f"prefix: 64 tokens of {file} are in the KV cache" in output.err
    assert chat("hi", arguments=[*arguments, "--no-prefix-caching"]) == 2
    assert "cannot load a prefix without prefix caching" in capsys.readouterr().err


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


def test_template_kwargs_are_in_force_for_every_turn(chat, monkeypatch):
    given, encode_chat = [], Tokenizer.encode_chat

    def spy(self, messages, **variables):
        given.append(variables)
        return encode_chat(self, messages, **variables)

    monkeypatch.setattr(Tokenizer, "encode_chat", spy)
    thinking = ("--chat-template-kwargs", '{"enable_thinking": false}')
    assert chat("one", "two", arguments=("--max-new-tokens", "1", *thinking)) == 0
    assert given == [{"enable_thinking": False}] * 2


def test_reset_keeps_the_system_message(chat, capsys, tmp_path):
    path = tmp_path / "chats.jsonl"
    lines = ("one", "/reset", "two", f"/save {path}", "/system", f"/save {path}")
    assert chat(*lines, arguments=("--system", "S", "--max-new-tokens", "2")) == 0
    last = [("user", "two"), ("assistant", ANSWER[:2])]
    assert saved(path) == [said(("system", "S"), *last), said(*last)]
    assert "cut off after 2 tokens: see --max-new-tokens" in capsys.readouterr().err


def test_settings_are_shown_and_changed(chat, capsys):
    lines = (
        "/set",
        "/set max_new_tokens 2",
        '/set stop "H"',  # As it is shown.
        "one",
        "/set stop H",
        "one",
        "/set stop",
        "one",
        "/exit",
        "no",
    )
    assert chat(*lines, arguments=("--seed", "7")) == 0
    output = capsys.readouterr()
    assert output.out == f"\n\n{ANSWER[:2]}\n"
    for told in ("\ntop_p 1.0\n", "\nseed 7\n", "\nmax_new_tokens 2\n", '\nstop ["H"]\n'):
        assert told in output.err
    for line, words in (
        ("/set heat 1", "no setting heat; there are max_new_tokens, temperature,"),
        ("/set max-tokens 2", "no setting max_tokens (did you mean max_new_tokens?); there are"),
        ("/set n 2", "no setting n; there are max_new_tokens, temperature,"),  # One answer a turn.
        ("/set top-p 2", "top_p must be above 0 and at most 1, not 2"),
        ("/set seed x", "seed must be a whole number, not 'x'"),
        ("/rety", "no command /rety (did you mean /retry?); /help"),
        ("/retry", "nothing was said yet"),
    ):
        assert chat(line) == 2
        assert words in capsys.readouterr().err


def test_a_turn_that_the_model_has_no_token_for_is_forgotten(speller):
    timings = Timings(0.0, 0.0, 0.0)
    failed = Completion((1,), (), "", "error", None, timings, error="logits are NaN")
    events = iter([Event(0, NO_TOKEN, "", None, failed)])
    engine = SimpleNamespace(
        max_model_len=CONTEXT,
        run=lambda requests: Stream(lambda: next(events, None), lambda: None),
    )
    tokenizer = Tokenizer.from_folder(speller)
    conversation = LoadedConversation(SimpleNamespace(engine=engine), tokenizer, SamplingParams())
    assert [event.completion for event in conversation.say("one")] == [failed]
    assert conversation.messages == []


def test_an_answer_is_drawn_again_with_another_seed(chat, capsys, tmp_path):
    path = tmp_path / "chats.jsonl"
    lines = ("one", "/retry", f"/save {path}", "/reset", "/retry")
    assert chat(*lines, arguments=("--temp", "0.001")) == 2
    output = capsys.readouterr()
    assert output.out == f"{ANSWER}\n{ANSWER}\n"
    assert saved(path) == [said(("user", "one"), ("assistant", ANSWER))]
    seeds = [line.split()[1] for line in output.err.splitlines() if line.startswith("seed: ")]
    assert len(set(seeds)) == 2
    assert "nothing was said yet" in output.err
    assert chat("one", "/retry", arguments=("--temp", "0.001", "--seed", "7")) == 0
    assert "seed:" not in capsys.readouterr().err
    assert chat("/set temperature 0.001", "/set top_k 3") == 0
    assert capsys.readouterr().err.count("seed: ") == 1
    assert chat("/set seed 7", "/set temperature 0.001") == 0
    assert "seed:" not in capsys.readouterr().err


def test_ctrl_c_while_a_prompt_is_read_stops_before_its_next_chunk(
    chat, capsys, monkeypatch, tmp_path
):
    read = []
    forward = ModelRunner.forward

    def interrupted(self, *arguments):
        read.append(self)
        if len(read) == 2:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *arguments)

    def in_short_steps(*arguments):
        *others, options = arguments
        return load_model(*others, replace(options, max_num_batched_tokens=16))

    monkeypatch.setattr(ModelRunner, "forward", interrupted)
    monkeypatch.setattr("meshwen.cli.chat.load_model", in_short_steps)
    assert chat("x" * 60, f"/save {tmp_path / 'chats'}") == 2
    output = capsys.readouterr()
    assert (len(read), output.out) == (2, "")
    assert "(stopped)" in output.err
    assert "nothing was said yet" in output.err.splitlines()[-1]  # The turn is forgotten.


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("/re", ["/reset", "/retry"]),
        ("/set te", ["temperature"]),
        ("/save {}/fi", ["le"]),  # What is added to a path.
        ("/system /re", []),
        ("say /re", []),
    ],
)
def test_commands_settings_and_files_are_completed(tmp_path, typed, found):
    (tmp_path / "file").touch()
    completer = CommandCompleter(["/reset", "/retry", "/save", "/set"], ["temperature", "top_k"])
    document = Document(typed.format(tmp_path))
    completions = completer.get_completions(document, CompleteEvent())
    assert [one.text for one in completions] == found


def test_typed_turns_have_lines_and_a_history():
    pressed = {
        "one\r": "one",
        "\x1b[200~two\nlines\x1b[201~\r": "two\nlines",  # Pasted.
        "a\x1b\rb\r": "a\nb",  # Alt-Enter.
        "\x1b[A\x1b[A\x1b[A\r": "two\nlines",  # Up, past both lines of the last.
        "x\x03y\r": "y",  # Ctrl-C drops what was typed.
    }
    before = signal.set_wakeup_fd(-1)
    with create_pipe_input() as keys:
        turns = typed_turns(["/retry", "/save", "/set"], ["temperature"], (keys, DummyOutput()))
        for sent, expected in pressed.items():
            keys.send_text(sent)
            assert next(turns) == expected
        keys.send_text("\x04")  # Ctrl-D
        assert list(turns) == []
    assert signal.set_wakeup_fd(before) == -1


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
    monkeypatch.setattr(chat_module, "_typed_turns", lambda: lines)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(io, "StringIO", lambda text: terminal)
    assert chat() == 0
    output = capsys.readouterr()
    assert output.out == f"{ANSWER}\n"
    for text in ("/system TEXT", "no command /frob", "/save needs the name of a file"):
        assert text in output.err
