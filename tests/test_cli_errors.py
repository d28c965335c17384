# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on the command line is one clear line, and an exit status of its own."""

import io
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from meshwen.causal_lm import Qwen2ForCausalLM
from meshwen.cli import app, main
from meshwen.common.extras import PACKAGES, how_to_install
from meshwen.errors import MeshwenError
from speller import write_speller

ROOT = Path(__file__).parents[1]


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
        (["verify", "--meshes", ""], "--meshes must name a mesh, such as 1x1,1x8,2x4, not ''"),
        (["inspect", "a/" * 200], "does not exist"),
        (["inspect", "~nosuchuser/x"], "write the path without ~"),
        (["inspect", "a\0b"], "'a\\x00b' holds a NUL"),
        (
            ["generate", "hi", "--mesh", "2by4"],
            "error: --mesh must be such as 8, 1x8, 2x4 or data=",
        ),
        (["generate", "hi", "--dtype", "int8"], "--dtype must be float32 or bfloat16, not 'int8'"),
        (["verify", "--numerics", "x"], "--numerics must be fast, exact or both, not 'x'"),
        (["chat", "--quantization", "int4"], "--quantization must be int8, not 'int4'"),
        (["verify", "--reference", "x"], "--reference must be transformers, not 'x'"),
        (["eval", "compare", "a", "b", "--require", "x"], "must be identical or same-score, not"),
        (["eval", "gsm8k", "--out", "x", "--prompt-style", "y"], "--prompt-style must be qwen-box"),
        (["generate", "hi", "--numerics", "exact", "--mesh", "3"], "not 3; choose another mesh"),
        (["generate", "hi", "--model", "qwen2.5-7b"], "without weights"),
        (["generate", "hi", "--temperature", "-1"], "--temperature must be 0 (greedy) or more"),
        (["generate", "hi", "--top-p", "1.5"], "error: --top-p must be above 0 and at most 1"),
        (["generate", "hi", "--max-tokens", "0"], "error: --max-new-tokens must be at least 1"),
        (["generate", "hi", "--stop", ""], "error: --stop must be strings that are not empty"),
        (["generate", "hi", "--raw", "--system", "x"], "--system needs the chat template"),
        (["generate", "hi", "--logprobs"], "add --json"),
        (["generate", "hi", "--model", "qwen2.5-7b", "--load-format", "dummy"], "no tokenizer"),
        (["generate", "hi", "--batch-size", "0"], "--max-num-seqs must be at least 1, not 0"),
        (["generate", "hi", "--max-num-seqs", "abc"], "must be a whole number, not 'abc'"),
        (["generate", "hi", "--max-model-len", "5.5"], "must be a whole number, not '5.5'"),
        (["bench", "--gen-len", "0"], "--gen-len must be at least 1, not 0"),
        (["bench", "--runs", "x"], "--runs must be a whole number, not 'x'"),
        (["bench", "--batch", "0"], "with commas between, such as 1,8,32, not '0'"),
        (["eval", "gsm8k", "--out", "x", "--limit", "0"], "--limit must be at least 1, not 0"),
        (["eval", "gsm8k", "--out", "x", "--offset", "-1"], "--offset must be at least 0, not -1"),
        (["eval", "gsm8k", "--out", "x", "--seed", "-1"], "--seed must be from 0 to 42949"),
        (["generate", "hi", "--process-id", "-1"], "--process-id must be at least 0, not -1"),
        (["verify", "--coordinator-timeout", "soon"], "must be a number, not 'soon'"),
        (["verify", "--coordinator-timeout", "0"], "--coordinator-timeout must be at least 1, "),
        (["generate", " "], "the prompt is empty"),
        (["generate", "hi", "--prompts-file", "x"], "not both"),
        (["generate", "--prompts-file", "no-such-file"], "cannot read no-such-file: No such file"),
        (["chat", "--seed", "-1"], "error: --seed must be from 0 to 4294967295, not -1"),
        (["chat", "--load", "no-such-file"], "cannot read no-such-file"),
        (["inspect"], "error: missing argument 'MODEL'; see meshwen inspect --help"),
        (["inspect", "qwen2.5-7b", "--filter", "foo*"], "no tensor of qwen2.5-7b has a name like"),
        (["inspect", "qwen2.5-7b", "--stats"], "--stats reads weights"),
        (["inspect", "qwen2.5-7b", "--load-format", "torch"], "without weights"),
        (["inspect", "x", "y"], "error: got unexpected extra argument"),
        (
            ["inspect", "x", "--mesh"],
            "error: option '--mesh' requires an argument; see meshwen ins",
        ),
        (["inspect", "--frob"], "there is no option --frob; see meshwen inspect --help"),
        (["frobnicate"], "error: there is no command 'frobnicate'; see meshwen --help"),
        (["eval", "gsm9k"], "no command 'gsm9k' (did you mean gsm8k?); see meshwen eval --help"),
        (["gen", "hi"], "no command 'gen' (did you mean generate?); see meshwen --help"),
        (["generate", "hi", "--tp", "8"], "no option --tp (did you mean --mesh?); see meshwen gen"),
        (["generate", "hi", "--max-tokns", "8"], "did you mean --max-tokens, --max-new-tokens or"),
        (["generate", "hi", "-n", "many"], "--max-new-tokens must be a whole number, not 'many'"),
        (["generate", "hi", "-p", "hi"], "the prompt is given twice"),
        (["chat", "--temp", "hot"], "error: --temperature must be a number, not 'hot'"),
        (["inspect", "qwen9"], "qwen9 does not exist (did you mean a published size, qwen3-"),
        (["chat", "--model", "Qwen2.5-7B-Instruct"], "(did you mean a published size, qwen2.5-"),
    ],
)
def test_what_the_user_must_change_is_said_in_one_line(capsys, arguments, message):
    assert message in error(capsys, arguments)


def test_a_file_with_a_name_like_the_one_given_is_suggested(capsys, tmp_path):
    (tmp_path / "Qwen2.5-0.5B-Instruct").mkdir()
    line = error(capsys, ["inspect", str(tmp_path / "Qwen2.5-0.5B-Instrct")])
    assert f"does not exist (did you mean {tmp_path / 'Qwen2.5-0.5B-Instruct'}?)" in line


def test_what_an_error_says_to_install_is_what_the_extra_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for extra, packages in PACKAGES.items():
        declared = " ".join(project["optional-dependencies"][extra])
        assert all(package in declared for package in packages.split())


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
    assert "error: --top-k must be" in line


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
    assert how_to_install("lm-eval") in output
    assert how_to_install("lm-eval") in error(capsys, ["eval", "harness"])


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
