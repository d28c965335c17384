# SPDX-License-Identifier: Apache-2.0
"""What is not in the package uses what the package has: scripts and benchmarks, whose own
dependencies need not be installed."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [*ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/**/*.py")]


def imported(path: Path) -> list[tuple[str, str]]:
    """Module and name of every `from meshwen... import ...`."""
    return [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "meshwen"
        for alias in node.names
    ]


def test_there_is_something_to_look_at():
    assert ("meshwen", "Qwen2ForCausalLM") in [name for path in FILES for name in imported(path)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_a_script_imports_is_there(path):
    for module, name in imported(path):
        found = importlib.import_module(module)
        if not hasattr(found, name):
            importlib.import_module(f"{module}.{name}")
