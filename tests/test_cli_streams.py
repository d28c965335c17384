# SPDX-License-Identifier: Apache-2.0
"""What reaches a terminal, and streams that are closed, full or read by nobody."""

import errno
import io
import os
import subprocess
import sys

import pytest

from meshwen.checkpoints import open_checkpoint
from meshwen.cli import main
from meshwen.cli.console import harmless, note, working, write
from meshwen.cli.files import check_writable, write_text
from meshwen.errors import MeshwenError
from meshwen.tokenizer.tokenizer import Tokenizer
from speller import write_speller

EVIL = "a\x1b]0;title\x07\x1b[2J\rb\x7f\x9b31m\u202ec\u2066\x00"
SHOWN = r"a\x1b]0;title\x07\x1b[2J\rb\x7f\x9b31m\u202ec\u2066\x00"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_obeys_nothing_that_others_wrote(monkeypatch):
    assert harmless(EVIL) == SHOWN
    assert harmless("a\n\tb é 水 \N{CHRISTMAS TREE}") == "a\n\tb é 水 \N{CHRISTMAS TREE}"
    for stream, shown in ((Terminal(), SHOWN), (io.StringIO(), EVIL)):  # A pipe gets every byte.
        monkeypatch.setattr(sys, "stdout", stream)
        write(EVIL, end="")
        assert stream.getvalue() == shown
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        note(EVIL)
        assert stream.getvalue() == f"{SHOWN}\n"


def test_what_is_being_done_shows_on_a_terminal_alone(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for stream, shown in ((Terminal(), "reading [bold]" + SHOWN), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        with working(lambda: f"reading [bold]{EVIL}") as stop:
            stop()
            end = len(stream.getvalue())
        assert stream.getvalue()[:end].count(shown)
        assert len(stream.getvalue()) == end
        assert bool(end) == bool(shown)


def test_errors_obey_nothing_and_end_somewhere(capsys, tmp_path):
    template = r'{"chat_template": "{{ raise_exception(\"\u001b[2J\") }}"}'
    (write_speller(tmp_path / "template") / "tokenizer_config.json").write_text(template)
    config = write_speller(tmp_path / "config") / "config.json"
    config.write_text(config.read_text().replace("qwen2", r"\u001b[2J"))
    for arguments in (
        ["inspect", str(tmp_path / "config")],
        ["generate", "hi", "--model", str(tmp_path / "template")],
        ["generate", "hi", "--model", f"x\x1b[2J/{'y' * 10_000}"],
        ["generate", "hi", "--mesh", "\x1b[2J", "--debug"],
        ["\x1b[2J"],
    ):
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert "\x1b" not in told
        assert "1b[2J" in told  # As Python or JSON writes it.
        assert len(told.splitlines()[-1]) < 2100


class Full(io.StringIO):
    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_stops_answers_but_not_for_notes(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Full())
    note("hi")
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(MeshwenError, match="cannot write to stdout: No space left on device"):
        write("hi")


def test_a_closed_stdout_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["inspect", "demo"]) == 2
    assert "error: stdout is closed" in capsys.readouterr().err


def test_in_a_folder_that_is_gone_a_report_is_refused_first(capsys, monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["verify", "--json", "x"]) == 2
    assert "error: cannot write x: No such file or directory" in capsys.readouterr().err


def test_names_that_are_no_utf8_are_written_escaped(capsys, monkeypatch, tmp_path):
    name = os.fsdecode(b"m\xff")
    write_speller(tmp_path / "m").rename(tmp_path / name)
    with open_checkpoint(str(tmp_path / name)) as checkpoint:
        assert checkpoint.name == r"m\xff"
        assert Tokenizer.from_checkpoint(checkpoint) is not None
    check_writable(tmp_path / f"{name}.html")
    write_text(tmp_path / f"{name}.html", name)
    assert (tmp_path / f"{name}.html").read_bytes() == rb"m\udcff"


def test_what_a_folder_takes_is_written_and_nothing_longer(tmp_path):
    longest = tmp_path / ("x" * 255)
    check_writable(longest)
    write_text(longest, "text")
    assert longest.read_text() == "text"
    with pytest.raises(MeshwenError, match=r"cannot write .*x: File name too long"):
        check_writable(tmp_path / ("x" * 256))


# What only a process has: descriptors, and what Python does at its end.
@pytest.mark.parametrize(
    ("shell", "status", "lines"),
    [
        ("2>&-; echo $?", 2, []),
        (">/dev/full; echo $? >&2", 2, ["meshwen: error: cannot read or write: No space left on"]),
        ("| true; echo ${PIPESTATUS[0]} >&2", 1, []),
    ],
)
def test_streams_that_are_closed_full_or_not_read(shell, status, lines, tmp_path):
    model = "demo" if lines or status == 1 else "no-such-model"
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m meshwen inspect {model} {shell}"],
        capture_output=True,
        text=True,
        check=False,
    )
    told = (done.stdout + done.stderr).splitlines()
    assert told[-1] == str(status)
    assert len(told) == 1 + len(lines)
    assert all(text in line for text, line in zip(lines, told, strict=False))
