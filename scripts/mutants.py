# SPDX-License-Identifier: Apache-2.0
"""Puts faults into copies of the package, one at a time, and says whether the tests find them.

    python scripts/mutants.py                  each fault against the test files named beside it
    python scripts/mutants.py --only engine    the faults whose names contain a text
    python scripts/mutants.py --whole          against all test files, those named first
    python scripts/mutants.py --tests DIR      the tests of another checkout, on this package

`mutants_list.py` holds the faults. The test files run without a fault first; exit status 2: one
fails. A fault is found when a test fails, hangs or crashes with it; exit status 1: one is not
found. Skipped tests find nothing: those of the kernels need a CPU with AVX2 or NEON.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from mutants_list import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
_FAILED = re.compile(r"^(?:FAILED|ERROR) tests/(\S+)", re.MULTILINE)
_PARTS = (
    *("src", "scripts", "benchmarks", "examples", "docs"),
    *("pyproject.toml", "hatch_build.py", "README.md"),
)
_UNFIT = "scripts"  # Its tests check that each fault's text is there: not so once one is put in.
_TIMEOUT = 400  # seconds for the test files of one fault
_NOTHING_RAN = 5  # pytest's exit status


def mutated(fault: Fault, source: str) -> str:
    """The file's text with the fault.

    Raises:
        ValueError: the text to be replaced is not there exactly once.
    """
    count = source.count(fault.old)
    if count != 1:
        raise ValueError(f"{fault.name}: {fault.path} has its text {count} times")
    return source.replace(fault.old, fault.new)


def first_failure(
    tests: Path, names: Sequence[str], fault: Fault | None, timeout: float | None = _TIMEOUT
) -> str | None:
    """Runs test files on a copy of the package, up to the first that fails.

    Args:
        tests: the folder of tests.
        names: of test files, without `test_`.
        fault: to be put in; None: none.
        timeout: in seconds; None: none.

    Returns:
        The test that failed, or in brackets what happened else; None where all passed.
    """
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        for part in _PARTS:
            place = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            place(ROOT / part, copy / part)
        shutil.copytree(tests, copy / "tests")
        if fault is not None:
            path = copy / fault.path
            path.write_text(mutated(fault, path.read_text(encoding="utf-8")), encoding="utf-8")
            if path.suffix in {".c", ".h"}:
                build = [sys.executable, copy / "scripts" / "build_kernels.py"]
                subprocess.run(build, stdout=subprocess.DEVNULL, check=True)
        files = [f"tests/test_{name}.py" for name in names]
        return _run(copy, [one for one in files if (copy / one).is_file()], timeout)


def _run(copy: Path, files: list[str], timeout: float | None) -> str | None:
    if not files:
        return None
    # What is compiled is kept for the next fault, apart from what `make test` keeps.
    cache = f"cache_dir={ROOT / '.pytest_cache' / 'mutants'}"
    arguments = ["-x", "-q", "-m", "not real and not torch", "-o", cache, *files]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy / "src")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "(hangs)"
    if done.returncode in (0, _NOTHING_RAN):
        return None
    if failed := _FAILED.search(done.stdout):
        return failed[1]
    return f"(pytest ends with status {done.returncode})"


def main() -> int:
    """Prints a line a fault, and how many were found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose names contain this; default: all")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", help="the folder of tests")
    parser.add_argument("--whole", action="store_true", help="run every test file for each fault")
    parser.add_argument(
        "--jobs", type=int, default=2, help="faults tried at the same time; default: 2"
    )
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if options.only in fault.name]
    every = sorted(p.stem.removeprefix("test_") for p in options.tests.glob("test_*.py"))
    named = sorted({name for fault in chosen for name in fault.tests})
    if not chosen:
        parser.error("there is no such fault")
    if missing := set(named) - set(every):
        parser.error(f"{options.tests} has no test_{min(missing)}.py")
    every = [name for name in every if name != _UNFIT]
    if failed := first_failure(options.tests, every if options.whole else named, None, None):
        parser.exit(2, f"without a fault, this fails: {failed}\n")

    def judged(fault: Fault) -> tuple[str, str | None, float]:
        rest = [name for name in every if options.whole and name not in fault.tests]
        began = time.monotonic()
        timeout = None if options.whole else _TIMEOUT
        test = first_failure(options.tests, [*fault.tests, *rest], fault, timeout)
        return fault.name, test, time.monotonic() - began

    missed = []
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        for one in as_completed(pool.submit(judged, fault) for fault in chosen):
            name, test, seconds = one.result()
            print(f"{name:<50} {seconds:5.0f} s  {test or 'NOT FOUND'}", flush=True)
            missed += [name] if test is None else []
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
