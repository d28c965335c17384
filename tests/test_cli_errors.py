# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on the command line is one clear line, and an exit status of its own."""

import io
import subprocess
import sys

import pytest

from meshwen.checkpoints import LOAD_FORMATS
from meshwen.cli import app, main
from meshwen.cli.options import LoadFormat
from speller import write_speller


@pytest.fixture(autouse=True)
def _users_cache_stays_alone(monkeypatch):
    monkeypatch.setattr("meshwen.compilation_cache.enable_compilation_cache", lambda: None)


@pytest.fixture(scope="module")
def speller(tmp_path_factory):
    return str(write_speller(tmp_path_factory.mktemp("models") / "speller"))


def error(capsys, arguments):
    """Runs a command that must fail: its one line on stderr."""
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("meshwen: error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "hi", "--model", "no/such/folder/here"],
            "no/such/folder/here does not exist",
        ),
        (["generate", "hi", "--mesh", "2by4"], "mesh '2by4' does not parse"),
        (["generate", "hi", "--dtype", "int8"], "--dtype"),
        (["generate", "hi", "--numerics", "exact"], "--numerics"),
        (["generate", "hi", "--model", "qwen2.5-7b"], "without weights"),
        (["generate", "hi", "--temperature", "-1"], "temperature must be 0 (greedy) or more"),
        (["generate", "hi", "--top-p", "1.5"], "top_p must be above 0 and at most 1"),
        (["generate", "hi", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["generate", "hi", "--stop", ""], "stop must be strings that are not empty"),
        (["generate", "hi", "--raw", "--system", "x"], "--system needs the chat template"),
        (["generate", "hi", "--logprobs"], "add --json"),
        (["generate", " "], "the prompt is empty"),
        (["generate", "hi", "--prompts-file", "x"], "not both"),
        (["generate", "--prompts-file", "no-such-file"], "cannot read no-such-file: No such file"),
        (["chat", "--seed", "-1"], "seed must be from 0"),
        (["chat", "--load", "no-such-file"], "cannot read no-such-file"),
        (["inspect"], "Missing argument 'MODEL'"),
        (["inspect", "qwen2.5-7b", "--filter", "foo*"], "no tensor of qwen2.5-7b has a name like"),
        (["inspect", "qwen2.5-7b", "--stats"], "--stats reads weights"),
        (["inspect", "a/b", "--load-format", "dummy"], "--load-format dummy takes a folder"),
        (["inspect", "--frob"], "No such option: --frob"),
        (["frobnicate"], "No such command 'frobnicate'"),
    ],
)
def test_what_the_user_must_change_is_said_in_one_line(capsys, arguments, message):
    assert message in error(capsys, arguments)


def test_a_prompt_beyond_the_context_is_refused(capsys, speller):
    assert main(["generate", "x" * 200, "--model", speller]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines()[-1].startswith("meshwen: error: prompt 1 has 219 tokens")


def test_a_hub_id_is_refused_offline(capsys, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "HF_HUB_OFFLINE" in error(capsys, ["inspect", "some-one/some-model"])


def test_debug_shows_the_traceback_before_the_line(capsys):
    assert main(["inspect", "no/such/folder/here", "--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("meshwen: error: no/such/folder/here does not exist")


def test_a_defect_is_named_in_one_line_with_a_status_of_its_own(capsys, monkeypatch):
    def broken(*arguments, **keywords):
        raise ValueError("two\nlines")

    monkeypatch.setattr(app, "app", broken)
    assert main(["inspect"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("meshwen: error: unexpected ValueError: two lines (--debug")


def test_ctrl_c_ends_a_command_with_status_130(capsys, monkeypatch):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("meshwen.cli.generate.read_prompts", interrupted)
    assert main(["generate", "hi"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_no_prompt_on_a_terminal_says_how_to_give_one(capsys, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert "give one as an argument, pipe it in" in error(capsys, ["generate"])


def test_without_arguments_the_commands_are_listed(capsys):
    assert main([]) == 0
    output = capsys.readouterr().out
    assert all(f"  {command} " in output for command in ("generate", "chat", "inspect"))


def test_the_load_formats_offered_are_those_that_exist():
    assert [choice.value for choice in LoadFormat] == [*LOAD_FORMATS, "dummy"]


def test_jax_is_not_imported_before_a_command_runs():
    code = "import sys, meshwen.cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
