# SPDX-License-Identifier: Apache-2.0
"""GSM8K from the hub, through a local stand-in, or from a file; what is said where that fails."""

import json
import re
import sys

import huggingface_hub
import pyarrow
import pytest
from huggingface_hub import errors
from pyarrow import parquet

from meshwen.cli import main
from meshwen.common.extras import how_to_install
from meshwen.errors import MeshwenError
from meshwen.evals.problems import hub_problems, read_problems

ROWS = [
    {"question": "How many are 2 and 2?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
    {"question": "And 1,000 more?", "answer": "#### 1,004"},
]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Stands for the hub: has the rows in the form of its files, and notes what it is asked."""
    asked = []

    def download(repo_id, filename, *, repo_type):
        asked.append((repo_type, repo_id, filename))
        path = tmp_path / "data.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


@pytest.mark.parametrize("split", ["test", "train"])
def test_the_hubs_split_is_read(stand_in, split):
    problems = hub_problems(split)
    assert stand_in == [("dataset", "openai/gsm8k", f"main/{split}-00000-of-00001.parquet")]
    assert [(p.number, p.question, p.gold) for p in problems] == [
        (0, ROWS[0]["question"], "4"),
        (1, ROWS[1]["question"], "1,004"),
    ]


def test_a_row_that_is_no_problem_is_named(stand_in, monkeypatch):
    monkeypatch.setitem(ROWS[1], "answer", "none")
    with pytest.raises(MeshwenError, match="openai/gsm8k test, row 2: the answer does not end"):
        hub_problems("test")


def test_a_hub_out_of_reach_is_told_with_what_to_give_instead(monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    options = ["--model", "qwen2.5-7b", "--load-format", "dummy", "--out", str(tmp_path / "r")]
    assert main(["eval", "gsm8k", *options]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert "openai/gsm8k is not (wholly) in the hub cache" in error
    assert error.endswith("or pass the path of a file with the data")


def test_without_pyarrow_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MeshwenError, match=re.escape(how_to_install("gsm8k"))):
        hub_problems("test")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe2\x82", b" \n\xff"])
def test_the_line_of_the_first_byte_that_is_not_utf_8_is_named(tmp_path, end, bad):
    path = tmp_path / "data.jsonl"
    good = json.dumps(ROWS[0]).encode() + "\u2028é".encode() + end
    path.write_bytes(good * 1000 + bad + end + good + b"\xff")
    line = 1001 + bad.count(b"\n")
    with pytest.raises(MeshwenError, match=rf"data\.jsonl, line {line} is not UTF-8 text: give"):
        read_problems(path)


def test_a_line_that_is_nested_too_deeply_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + "[" * 100_000)
    with pytest.raises(MeshwenError, match=r"data\.jsonl, line 2: nested deeper than 100 levels"):
        read_problems(path)
