# SPDX-License-Identifier: Apache-2.0
"""Word problems from a file in GSM8K's form: a JSON object a line, `question` and `answer`."""

from __future__ import annotations

import json
from pathlib import Path

from meshwen.errors import MeshwenError
from meshwen.evals.answers import gold_answer, number
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
    except UnicodeDecodeError:
        raise MeshwenError(f"{path} is not UTF-8 text: give a JSON lines file") from None
    problems = [
        _problem(f"{path}, line {at + 1}", at, line)
        for at, line in enumerate(lines)
        if line.strip()
    ]
    if not problems:
        raise MeshwenError(f"{path} has no problems: expected a JSON object a line")
    return problems


def _problem(where: str, place: int, line: str) -> Problem:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise MeshwenError(f"{where} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise MeshwenError(f'{where}: expected an object {{"question": ..., "answer": ...}}')
    for name in ("question", "answer"):
        if not isinstance(content.get(name), str) or not content[name].strip():
            raise MeshwenError(f"{where}: {name!r} is missing, empty or no text")
    gold = gold_answer(content["answer"])
    if gold is None or number(gold) is None:
        raise MeshwenError(f"{where}: the answer does not end with '#### ' and a number")
    return Problem(place, content["question"], content["answer"])
