# SPDX-License-Identifier: Apache-2.0
"""What imports what: the package's parts only what stands below them, all of it only public JAX,
and scripts and benchmarks (whose own dependencies need not be installed) only what is there."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from importlinter import cli as linter

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "meshwen"
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


def test_each_part_of_the_package_imports_only_what_stands_below_it(capsys, monkeypatch):
    """The parts, in their order, are in pyproject.toml."""
    monkeypatch.syspath_prepend(PACKAGE.parent)
    # Its own would disable all loggers that there are, for the tests that follow too.
    monkeypatch.setattr("logging.config.dictConfig", lambda config: None)
    kept = (
        linter.lint_imports(str(ROOT / "pyproject.toml"), cache_dir=None)
        == linter.EXIT_STATUS_SUCCESS
    )
    assert kept, capsys.readouterr().out


# There is no other way to these: see the comments there.
PRIVATE = {"meshwen/parallel/distributed.py": ["jax._src.distributed"]}


def test_the_package_imports_nothing_private_of_jax_but_what_has_no_public_name():
    found = {
        str(path.relative_to(PACKAGE.parent)): private
        for path in PACKAGE.rglob("*.py")
        if (private := private_jax(path))
    }
    assert found == PRIVATE


def private_jax(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name for name in names if re.match(r"jax(lib)?\b.*\._", name)]
