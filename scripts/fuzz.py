# SPDX-License-Identifier: Apache-2.0
"""Alters files for as long as it may, and keeps what a reader misreads: see `tests/fuzzing.py`.

    python scripts/fuzz.py                              ten minutes, every reader
    python scripts/fuzz.py --seconds 60 --only json     the readers whose names contain a text

What is found is made as small as Hypothesis can and lies in tests/data/fuzz/READER/, where
`test_fuzz.py` tries it again; exit status 1. Commit it with the mend. A reader that takes longer
than ten seconds is a finding too.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import random
import sys
import time
import traceback
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import fuzzing
from meshwen.common import contained

LONGEST_S = 10.0
_BATCH = 50


class TooSlow(AssertionError):  # noqa: N818 - what it says
    """A reader took longer than it may."""


def found_in(target: fuzzing.Target, start: int, examples: int) -> tuple[bytes, str] | None:
    """The smallest file found that is misread, and what happened; None: none was found."""
    last = b""

    @seed(start)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        print_blob=False,
    )
    @given(target.altered)
    def run(data: bytes) -> None:
        nonlocal last
        last = data
        began = time.monotonic()
        fuzzing.check(target, data)
        if time.monotonic() - began > LONGEST_S:
            raise TooSlow(f"took {time.monotonic() - began:.1f} s")

    try:
        run()
    except Exception:  # Whatever a reader raises; Hypothesis ends with the smallest.
        return last, traceback.format_exc(limit=-3)
    return None


def keep(name: str, data: bytes) -> Path:
    """Writes a finding to where the tests try it again."""
    path = fuzzing.FINDINGS / name / hashlib.sha256(data).hexdigest()[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--seed", type=int, default=None, help="default: another each time")
    options = parser.parse_args()
    contained.TIME_LIMIT_S = 2.0  # Of templates and tokenizers: not what is looked for.
    logging.getLogger("hypothesis").setLevel(logging.ERROR)
    left = {
        name: target
        for name, target in fuzzing.targets().items()
        if options.only in name and not target.missing
    }
    if not left:
        parser.error(f"no reader that can be tried here has {options.only!r} in its name")
    draw = random.Random(options.seed)
    end, tried, kept = time.monotonic() + options.seconds, dict.fromkeys(left, 0), 0
    while left and time.monotonic() < end:
        for name, target in list(left.items()):
            examples = max(1, _BATCH // target.cost)
            misread = found_in(target, draw.getrandbits(32), examples)
            tried[name] += examples
            if misread is not None:
                kept += 1
                print(f"{name}: {keep(name, misread[0])}\n{misread[1]}", flush=True)
                del left[name]  # It would be found again; mend it first.
            if time.monotonic() > end:
                break
    print(f"{sum(tried.values())} files, {kept} misread")
    return 1 if kept else 0


if __name__ == "__main__":
    sys.exit(main())
