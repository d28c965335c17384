# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on the command line is one clear line, and an exit status of its own."""

import io
import subprocess
import sys
from importlib import metadata

import pytest

from meshwen.causal_lm import Qwen2ForCausalLM
from meshwen.cli import app, main
from meshwen.errors import MeshwenError
from speller import write_speller


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
        (["generate", "hi", "--model", ""], "the model's name is empty"),
        (["inspect", " "], "the model's name is empty"),
        (["inspect", "a/b", "--revision", ""], "the revision is empty"),
        (["inspect", "qwen2.5-7b", "--filter", ""], "no tensor of qwen2.5-7b has a name like ''"),
        (["verify", "--meshes", ""], "names no mesh"),
        (["inspect", "a/" * 200], "does not exist"),
        (["inspect", "~nosuchuser/x"], "write the path without ~"),
        (["inspect", "a\0b"], "'a\\x00b' holds a NUL"),
        (["generate", "hi", "--mesh", "2by4"], "mesh '2by4' does not parse"),
        (["generate", "hi", "--dtype", "int8"], "--dtype"),
        (["generate", "hi", "--numerics", "loose"], "--numerics"),
        (["generate", "hi", "--numerics", "exact", "--mesh", "3"], "not 3; choose another mesh"),
        (["generate", "hi", "--model", "qwen2.5-7b"], "without weights"),
        (["generate", "hi", "--temperature", "-1"], "temperature must be 0 (greedy) or more"),
        (["generate", "hi", "--top-p", "1.5"], "top_p must be above 0 and at most 1"),
        (["generate", "hi", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["generate", "hi", "--stop", ""], "stop must be strings that are not empty"),
        (["generate", "hi", "--raw", "--system", "x"], "--system needs the chat template"),
        (["generate", "hi", "--logprobs"], "add --json"),
        (["generate", "hi", "--model", "qwen2.5-7b", "--load-format", "dummy"], "no tokenizer"),
        (["generate", "hi", "--batch-size", "0"], "--batch-size"),
        (["generate", " "], "the prompt is empty"),
        (["generate", "hi", "--prompts-file", "x"], "not both"),
        (["generate", "--prompts-file", "no-such-file"], "cannot read no-such-file: No such file"),
        (["chat", "--seed", "-1"], "seed must be from 0"),
        (["chat", "--load", "no-such-file"], "cannot read no-such-file"),
        (["inspect"], "Missing argument 'MODEL'"),
        (["inspect", "qwen2.5-7b", "--filter", "foo*"], "no tensor of qwen2.5-7b has a name like"),
        (["inspect", "qwen2.5-7b", "--stats"], "--stats reads weights"),
        (["inspect", "qwen2.5-7b", "--load-format", "torch"], "without weights"),
        (["inspect", "--frob"], "No such option: --frob"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["gen", "hi"], "Did you mean generate?"),
        (["generate", "hi", "--tp", "8"], "Did you mean --mesh?"),
        (["generate", "hi", "--max-tokns", "8"], "--max-tokens"),
        (["generate", "hi", "-n", "many"], ", not 'many' (see --help)"),
        (["generate", "hi", "-p", "hi"], "the prompt is there twice"),
        (["chat", "--temp", "hot"], ", not 'hot' (see --help)"),
        (["chat", "--dtype", "fp16"], "'--dtype': dtype 'fp16' is not one of float32, bfloat16"),
    ],
)
def test_what_the_user_must_change_is_said_in_one_line(capsys, arguments, message):
    assert message in error(capsys, arguments)


@pytest.fixture
def no_weights(monkeypatch):
    """Fails where weights are read or made up."""

    def fail(*_):
        raise AssertionError("weights were wanted")

    monkeypatch.setattr("meshwen.causal_lm.load_params", fail)
    monkeypatch.setattr("meshwen.causal_lm.dummy_params", fail)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x" * 200, "line 1 has 219 tokens, but the model's context is 160"),
        ('{"prompt_tokens": [1, 259]}', "line 1 has a token id outside the vocabulary of 259: 259"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_before_loading(
    capsys, tmp_path, speller, no_weights, line, message
):
    (tmp_path / "prompts").write_text(line)
    arguments = ["--prompts-file", str(tmp_path / "prompts"), "--model", speller]
    assert message in error(capsys, ["generate", *arguments])


def test_a_checkpoint_without_a_chat_template_is_refused_before_loading(
    capsys, tmp_path, no_weights
):
    folder = write_speller(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    assert "no chat template: use --raw" in error(
        capsys, ["generate", "hi", "--model", str(folder)]
    )


def test_a_broken_tokenizer_is_refused_before_loading(tmp_path, no_weights):
    folder = write_speller(tmp_path)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(MeshwenError, match=r"tokenizer\.json"):
        Qwen2ForCausalLM.from_pretrained(folder)


def test_an_impossible_value_of_the_checkpoint_names_its_file(capsys, tmp_path, no_weights):
    path = write_speller(tmp_path) / "generation_config.json"
    path.write_text('{"top_p": 1.5}')
    for arguments in (["generate", "hi"], ["chat"]):
        line = error(capsys, [*arguments, "--model", str(tmp_path)])
        assert f"{path}: top_p must be above 0" in line
    line = error(capsys, ["generate", "hi", "--model", str(tmp_path), "--top-k", "-1"])
    assert "error: top_k must be" in line


def test_a_hub_id_is_refused_offline(capsys, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "HF_HUB_OFFLINE" in error(capsys, ["inspect", "some-one/some-model"])


@pytest.mark.parametrize("arguments", [[], ["-"], ["--prompts-file", "-"]])
def test_a_closed_stdin_is_no_prompt(capsys, monkeypatch, arguments):
    monkeypatch.setattr(sys, "stdin", None)
    assert "stdin is closed" in error(capsys, ["generate", *arguments])


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


def test_eval_without_a_command_lists_its_own(capsys):
    assert main(["eval"]) == 0
    output = capsys.readouterr().out
    assert all(f"  {command} " in output for command in ("gsm8k", "meshes", "harness", "compare"))


def test_the_harness_has_help_without_its_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "harness", "--help"]) == 0
    output = capsys.readouterr().out
    assert "--model_args pretrained=demo" in output
    assert "pip install 'meshwen[lm-eval]'" in output
    assert "pip install 'meshwen[lm-eval]'" in error(capsys, ["eval", "harness"])


@pytest.mark.parametrize(
    ("typed", "found"),
    [("gen", "generate"), ("generate --temp", "--temperature"), ("generate --dtype b", "bfloat16")],
)
def test_a_shell_completes_commands_options_and_values(capsys, monkeypatch, typed, found):
    monkeypatch.setenv("_MESHWEN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"meshwen {typed}")
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split())))
    assert main([]) == 0
    assert found in capsys.readouterr().out.split()


@pytest.mark.parametrize("installed", [True, False])
def test_the_version_is_that_of_the_installed_package(capsys, monkeypatch, installed):
    versions = {"meshwen": "1.2.3"} if installed else {}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"meshwen {'1.2.3' if installed else '0+unknown'}\n"


def test_jax_is_not_imported_before_a_command_runs():
    code = "import sys, meshwen.cli.app; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
