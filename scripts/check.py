# SPDX-License-Identifier: Apache-2.0
"""What a change should pass before it is committed, in under a minute: format, lint, types, and the
tests near the change. `make check` runs it.

The change is what differs from the last commit; where nothing does, the last commit. Near are, in
this order: test files that changed; those named after a module that changed, or with a helper that
changed; those that import the module; those that import what imports it. They run until a test
fails or the time is over. Tests that had not begun by then are counted. Slow tests are left to
`make test`.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
PACKAGE = ROOT / "src" / "meshwen"
_CSRC = PACKAGE / "ops/cpu/csrc"
_CSRC_OF = "meshwen.ops.cpu.kernels"  # which loads what is compiled from it
_INTERRUPTED, _NOTHING_RAN = 2, 5  # pytest's exit statuses
_LEFT = re.compile(r"^!+ .*?(\d+) tests not begun within .* !+$", re.MULTILINE)
# Other files, and the test files that show whether they work at all.
_SMOKE = {
    "scripts": "test_scripts.py",
    "scripts/build_kernels.py": "test_build_kernels.py",
    "hatch_build.py": "test_build_kernels.py",
    "tests/conftest.py": "test_heads.py",
    "tests/costs.py": "test_heads.py",
    "pyproject.toml": "test_heads.py",
}


def changed_files(since: str | None) -> list[Path]:
    """Files that differ from a commit; without one from the last, else those that it changed."""
    if since is not None:
        since = _git("rev-parse", "--verify", "--end-of-options", f"{since}^{{commit}}")[0].strip()
    untracked = _git("ls-files", "-z", "--others", "--exclude-standard")
    found = _git("diff", "-z", *_NAMES, since or "HEAD") + untracked
    if not found and since is None:
        found = _git("show", "-z", "--format=", *_NAMES, "HEAD")
    return [ROOT / name for name in found]


_NAMES = ("--name-only", "--no-renames", "--relative")


def _git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        reason = os.fsdecode(done.stderr).strip().splitlines() or ["no reason given"]
        sys.exit(f"check: git {arguments[0]} failed: {reason[0]}")
    return [name for name in os.fsdecode(done.stdout).split("\0") if name]


def near_tests(changed: Iterable[Path]) -> list[Path]:
    """Test files near some files, the nearest first."""
    changed = {path.relative_to(ROOT).as_posix() for path in changed}
    modules = {name for path in changed if (name := module_of(ROOT / path))}
    helpers = {path.stem: imports(path) for path in TESTS.glob("*.py")}
    altered = {Path(path).stem for path in changed if Path(path).parent == Path("tests")}
    users = _importers(modules)
    smoke = {test for prefix, test in _SMOKE.items() if any(p.startswith(prefix) for p in changed)}
    ranked = []
    for test in sorted(TESTS.glob("test_*.py")):
        own = helpers[test.stem]
        all_ = own.union(*(helpers[name] for name in own & helpers.keys()))
        ranks = (
            test.stem in altered,
            bool(altered & own) or any(_is_named_after(test, name) for name in modules),
            bool(modules & own) or test.name in smoke,
            bool(users & all_),
        )
        if any(ranks):
            ranked.append((ranks.index(True), test))
    return [test for _, test in sorted(ranked)]


def module_of(path: Path) -> str | None:
    """The module that a file of the package is, or a part of: for data, its package."""
    if not path.is_relative_to(PACKAGE):
        return None
    if path.is_relative_to(_CSRC):
        return _CSRC_OF
    parts = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    if path.suffix != ".py" or parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def imports(path: Path) -> set[str]:
    """Modules that a file names in its imports, and names that may be modules."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return set()  # The linter names it.
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _importers(modules: set[str]) -> set[str]:
    """Some modules of the package, and all that import them, however far."""
    graph = {str(module_of(path)): imports(path) for path in PACKAGE.rglob("*.py")}
    found, new = set(modules), set(modules)
    while new:
        new = {name for name, imported in graph.items() if imported & new} - found
        found |= new
    return found


def _is_named_after(test: Path, module: str) -> bool:
    return f"_{module.rpartition('.')[2]}_" in f"{test.stem}_"


class Step(NamedTuple):
    """What a command came to."""

    name: str
    status: int
    output: str
    seconds: float


def run(name: str, *command: str | Path) -> Step:
    """Runs a module of this Python."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return Step(name, done.returncode, done.stdout, time.monotonic() - began)


def main() -> int:
    """Prints what failed, and a line for each step; 1 where one failed."""
    parser = argparse.ArgumentParser(description="Format, lint, types, and tests near a change.")
    parser.add_argument("--since", metavar="COMMIT", help="what differs from it is the change")
    parser.add_argument(
        "--seconds", type=float, default=40, help="no test begins after so many; default: 40"
    )
    options = parser.parse_args()
    near = near_tests(changed_files(options.since))
    marks = "not slow and not real and not torch"
    tests = ("pytest", "-x", "-q", "-m", marks, f"--seconds={options.seconds}", *near)
    with ThreadPoolExecutor() as pool:
        steps = [
            pool.submit(run, "format", "ruff", "format", "--check", "."),
            pool.submit(run, "lint", "ruff", "check", "."),
            pool.submit(run, "types", "mypy"),
        ]
        if near:
            names = ", ".join(test.stem.removeprefix("test_") for test in near)
            steps.append(pool.submit(run, f"tests: {names}", *tests))
        results = [step.result() for step in steps]
    if near:
        results[-1] = _judged(results[-1])
    for step in results:
        if step.status:
            print(step.output)
    for step in results:
        print(f"{'FAILED' if step.status else 'passed'}  {step.seconds:5.1f} s  {step.name}")
    if not near:
        print("no tests are near what has changed")
    return 1 if any(step.status for step in results) else 0


def _judged(tests: Step) -> Step:
    """The tests' step; its name says what did not run."""
    if tests.status == _INTERRUPTED and (left := _LEFT.search(tests.output)):
        return tests._replace(
            status=0, name=f"{tests.name} ({left[1]} tests had not begun: make test)"
        )
    if tests.status == _NOTHING_RAN:
        return tests._replace(status=0, name=f"{tests.name} (only slow ones: make test)")
    return tests


if __name__ == "__main__":
    sys.exit(main())
