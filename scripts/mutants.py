# SPDX-License-Identifier: Apache-2.0
"""Puts faults into a copy of the package, one at a time, and says whether the tests find them.

    python scripts/mutants.py                  each fault against the test files named beside it
    python scripts/mutants.py --only causal    the faults whose names contain a text
    python scripts/mutants.py --whole          each fault against the whole suite (an hour or more)
    python scripts/mutants.py --tests DIR      the tests of another checkout, on this package

A fault is found when a test fails that passes without it. The exit status is 1 where one is not.
`mutants_list.py` holds the faults.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutants_list import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
_FAILED = re.compile(r"^(?:FAILED|ERROR) tests/(\S+)", re.MULTILINE)
_PARTS = ("src", "scripts", "benchmarks", "examples", "docs", "pyproject.toml", "README.md")
_TIMEOUT = 1800  # seconds for the test files of one fault; a hang counts as found


@dataclass(frozen=True)
class Verdict:
    """What the tests say of a fault."""

    fault: Fault
    test: str | None  # the first that failed; None where all passed
    seconds: float


def mutated(fault: Fault, source: str) -> str:
    """The file's text with the fault.

    Raises:
        ValueError: the text to be replaced is not there exactly once.
    """
    count = source.count(fault.old)
    if count != 1:
        raise ValueError(f"{fault.name}: {fault.path} has its text {count} times")
    return source.replace(fault.old, fault.new)


def verdict(fault: Fault, tests: Path, files: list[str]) -> Verdict:
    """Runs test files on a copy that has the fault, up to the first failure."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder) / "repository"
        copy.mkdir()
        for part in _PARTS:
            place = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            place(ROOT / part, copy / part)
        shutil.copytree(tests, copy / "tests")
        path = copy / fault.path
        path.write_text(mutated(fault, path.read_text(encoding="utf-8")), encoding="utf-8")
        found = [f"tests/test_{name}.py" for name in files]
        began = time.monotonic()
        test = _first_failure(copy, [one for one in found if (copy / one).is_file()])
        return Verdict(fault, test, time.monotonic() - began)


def _first_failure(copy: Path, files: list[str]) -> str | None:
    # What is compiled is kept for the next fault, apart from what `make test` keeps.
    cache = f"cache_dir={ROOT / '.pytest_cache' / 'mutants'}"
    arguments = ["-x", "-q", "-m", "not real and not torch", "-o", cache, *files]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy / "src")},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "(a test that hangs)"
    if done.returncode == 0:
        return None
    failed = _FAILED.search(done.stdout)
    if not failed:
        raise RuntimeError(f"pytest ended with status {done.returncode}:\n{done.stdout[-3000:]}")
    return failed[1]


def main() -> int:
    """Prints a line a fault, and how many were found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose names contain this")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", help="the folder of tests")
    parser.add_argument("--whole", action="store_true", help="run every test file for each fault")
    parser.add_argument("--jobs", type=int, default=2, help="faults tried at the same time")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if options.only in fault.name]
    every = sorted(p.stem.removeprefix("test_") for p in options.tests.glob("test_*.py"))

    def judged(fault: Fault) -> Verdict:
        rest = [name for name in every if options.whole and name not in fault.tests]
        return verdict(fault, options.tests, [*fault.tests, *rest])

    missed = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for one in pool.map(judged, chosen):
            print(
                f"{one.fault.name:<34} {one.seconds:5.0f} s  {one.test or 'NOT FOUND'}", flush=True
            )
            missed += [one.fault.name] if one.test is None else []
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
