# SPDX-License-Identifier: Apache-2.0
"""What a change should pass before it is committed, in under a minute: format, lint, types, and the
tests near the change. `make check` runs it.

Near are, in this order: test files that changed, those named after a module that changed, those
that import it, and those whose helpers do. They run until a test fails or the time is over; what
was left is counted.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
PACKAGE = ROOT / "src" / "meshwen"


def changed_files(since: str | None) -> list[Path]:
    """Files that differ from a commit; without one from the last, else those that it changed."""
    untracked = _git("ls-files", "--others", "--exclude-standard")
    found = _git("diff", "--name-only", since or "HEAD") + untracked
    if not found and since is None:
        found = _git("diff", "--name-only", "HEAD~1", "HEAD")
    return [ROOT / name for name in found]


def _git(*arguments: str) -> list[str]:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"check: git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout.split("\n")[:-1]


def near_tests(changed: Iterable[Path]) -> list[Path]:
    """Test files near some files, the nearest first."""
    changed = list(changed)
    modules = {name for path in changed if (name := module_of(path))}
    helpers = {path.stem for path in TESTS.glob("*.py")} - {"conftest"}
    ranked = []
    for test in sorted(TESTS.glob("test_*.py")):
        imported = imports(test)
        through = {
            name for helper in imported & helpers for name in imports(TESTS / f"{helper}.py")
        }
        changed_helper = any(path.parent == TESTS and path.stem in imported for path in changed)
        named = {part for name in modules if (part := name.rpartition(".")[2])}
        ranks = (
            test in changed,
            changed_helper or any(_is_named_after(test, part) for part in named),
            bool(modules & imported),
            bool(modules & through),
        )
        if any(ranks):
            ranked.append((ranks.index(True), test))
    return [test for _, test in sorted(ranked)]


def module_of(path: Path) -> str | None:
    """The module that a file of the package is, or a part of: for data, its package."""
    if not path.is_relative_to(PACKAGE):
        return None
    parts = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    if path.suffix != ".py" or parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def imports(path: Path) -> set[str]:
    """Modules that a file names in its imports, and names that may be modules."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _is_named_after(test: Path, name: str) -> bool:
    return f"_{name}_" in f"{test.stem}_"


def run(name: str, *command: str | Path) -> tuple[str, bool, str, float]:
    """A command's name, whether it succeeded, what it printed, and seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return name, done.returncode == 0, done.stdout, time.monotonic() - began


def main() -> int:
    """Prints what failed, and a line for each step; 1 where one failed."""
    parser = argparse.ArgumentParser(description="Format, lint, types, and tests near a change.")
    parser.add_argument("--since", metavar="COMMIT", help="what differs from it has changed")
    parser.add_argument("--seconds", type=float, default=40, help="for tests; default: 40")
    options = parser.parse_args()
    near = near_tests(changed_files(options.since))
    arguments = [
        "-x",
        "-q",
        "-m",
        "not slow and not real and not torch",
        f"--seconds={options.seconds}",
    ]
    with ThreadPoolExecutor() as pool:
        steps = [
            pool.submit(run, "format", "ruff", "format", "--check", "."),
            pool.submit(run, "lint", "ruff", "check", "."),
            pool.submit(run, "types", "mypy"),
        ]
        if near:
            title = f"tests: {', '.join(test.stem.removeprefix('test_') for test in near)}"
            steps.append(pool.submit(run, title, "pytest", *arguments, *near))
        results = [step.result() for step in steps]
    for _, succeeded, output, _ in results:
        if not succeeded:
            print(output)
    if near:
        print(results[-1][2].strip().splitlines()[-1])
    for name, succeeded, _, seconds in results:
        print(f"{'passed' if succeeded else 'FAILED'}  {seconds:5.1f} s  {name}")
    if not near:
        print("no tests are near what has changed")
    return 0 if all(succeeded for _, succeeded, _, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
