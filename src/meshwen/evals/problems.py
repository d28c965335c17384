# SPDX-License-Identifier: Apache-2.0
"""Word problems: a file in GSM8K's form, a JSON object a line, or the hub's GSM8K itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meshwen.checkpoints.hub import dataset_file
from meshwen.common.extras import how_to_install
from meshwen.common.json_files import parse_json
from meshwen.errors import MeshwenError
from meshwen.evals.answers import gold_answer
from meshwen.evals.numerals import number
from meshwen.evals.styles import Problem


def read_problems(path: Path) -> list[Problem]:
    """All problems of a file.

    Raises:
        MeshwenError: it cannot be read, has no problem, or a line is none; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # Not at a U+2028 inside of a text.
    except OSError as error:
        raise MeshwenError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = len(error.object[: error.end].splitlines())
        raise MeshwenError(
            f"{path}, line {line} is not UTF-8 text: give a JSON lines file"
        ) from None
    problems = [
        _problem(f"{path}, line {at + 1}", at, line)
        for at, line in enumerate(lines)
        if line.strip()
    ]
    if not problems:
        raise MeshwenError(f"{path} has no problems: expected a JSON object a line")
    return problems


def hub_problems(split: str) -> list[Problem]:
    """All problems of a split of GSM8K, as openai/gsm8k on the hub has it.

    Args:
        split: "test" or "train".

    Raises:
        MeshwenError: the hub cannot be reached, or pyarrow, which reads its files, is not there.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise MeshwenError(
            "the hub's copy of GSM8K needs pyarrow: give the problems as a file, --data (and "
            f"--train), or {how_to_install('gsm8k')}"
        ) from None
    name = f"main/{split}-00000-of-00001.parquet"
    rows = parquet.read_table(dataset_file("openai/gsm8k", name)).to_pylist()
    return [_checked(f"openai/gsm8k {split}, row {at + 1}", at, row) for at, row in enumerate(rows)]


def _problem(where: str, place: int, line: str) -> Problem:
    return _checked(where, place, parse_json(line, where))


def _checked(where: str, place: int, content: Any) -> Problem:
    if not isinstance(content, dict):
        raise MeshwenError(f'{where}: expected an object {{"question": ..., "answer": ...}}')
    for name in ("question", "answer"):
        if not isinstance(content.get(name), str) or not content[name].strip():
            raise MeshwenError(f"{where}: {name!r} is missing, empty or no text")
    gold = gold_answer(content["answer"])
    if gold is None or number(gold) is None:
        raise MeshwenError(f"{where}: the answer does not end with '#### ' and a number")
    return Problem(place, content["question"], content["answer"])
