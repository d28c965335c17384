# SPDX-License-Identifier: Apache-2.0
"""What each test costs: time, programs compiled, subprocesses. `pytest --costs=FILE` writes it.

python tests/costs.py FILE...    prints the ten slowest tests, and the test files by time
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pytest
from jax import monitoring

# JAX reports the first for programs read from its cache too, and the second for these alone.
COMPILED = "/jax/core/compile/backend_compile_duration"
CACHE_HIT = "/jax/compilation_cache/cache_hits"
TRACED = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
)


@dataclass(frozen=True)
class Costs:
    """Of a process and the children that it waited for. Times in seconds.

    Attributes:
        wall: elapsed.
        cpu: of the process.
        children_cpu: of its children.
        compile: elapsed while programs were compiled, or read from the cache.
        trace: elapsed while functions were traced and lowered.
        programs: compiled, or read from the cache.
        cache_hits: how many of them were read.
        subprocesses: started.
    """

    wall: float
    cpu: float
    children_cpu: float
    compile: float
    trace: float
    programs: int
    cache_hits: int
    subprocesses: int

    def __sub__(self, other: "Costs") -> "Costs":
        return Costs(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class Meter:
    """Counts from its creation on."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._programs = self._hits = self._subprocesses = 0
        monitoring.register_event_duration_secs_listener(self._on_duration)
        monitoring.register_event_listener(self._on_event)
        sys.addaudithook(self._on_audit)

    def _on_duration(self, event: str, seconds: float, **_: object) -> None:
        self._seconds[event] += seconds
        self._programs += event == COMPILED

    def _on_event(self, event: str, **_: object) -> None:
        self._hits += event == CACHE_HIT

    def _on_audit(self, event: str, _: object) -> None:
        self._subprocesses += event == "subprocess.Popen"

    def now(self) -> Costs:
        times = os.times()
        return Costs(
            wall=time.perf_counter(),
            cpu=times.user + times.system,
            children_cpu=times.children_user + times.children_system,
            compile=self._seconds[COMPILED],
            trace=sum(self._seconds[event] for event in TRACED),
            programs=self._programs,
            cache_hits=self._hits,
            subprocesses=self._subprocesses,
        )


class Recorder:
    """In the process that runs tests: adds to each report what its phase cost."""

    def __init__(self) -> None:
        self._meter = Meter()
        self._last = self._meter.now()

    def pytest_runtest_logstart(self):
        self._last = self._meter.now()  # Not collecting, nor waiting for the next test.

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self):
        outcome = yield
        now = self._meter.now()
        outcome.get_result().costs = asdict(now - self._last)
        self._last = now


class Writer:
    """In the process that prints: sums the phases of each test and writes the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._costs: dict[str, Costs] = {}

    def pytest_runtest_logreport(self, report):
        if not hasattr(report, "costs"):  # Of a process that crashed.
            return
        costs = Costs(**report.costs)
        so_far = self._costs.get(report.nodeid)
        self._costs[report.nodeid] = costs if so_far is None else so_far + costs

    def pytest_sessionfinish(self):
        with self._path.open("w", encoding="utf-8") as out:
            for test, costs in self._costs.items():
                print(json.dumps({"test": test, **asdict(costs)}), file=out)


def register(config) -> None:
    """Records costs if `--costs` is given."""
    if not (path := config.getoption("costs")):
        return
    is_worker = hasattr(config, "workerinput")
    if not is_worker:
        try:
            Path(path).write_text("", encoding="utf-8")
        except OSError as error:
            raise pytest.UsageError(f"cannot write --costs {path}: {error.strerror}") from None
        config.pluginmanager.register(Writer(Path(path)))
    if is_worker or not config.getoption("numprocesses", None):
        config.pluginmanager.register(Recorder())


def read(path: Path) -> dict[str, Costs]:
    """Costs by test. Skips lines that are not valid, with a warning on stderr."""
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
            test = values.pop("test")
            found[test] = Costs(**values)
        except (ValueError, TypeError, KeyError, AttributeError):
            print(f"{path}, line {number}: not the costs of a test", file=sys.stderr)
    return found


def summary(found: dict[str, Costs]) -> str:
    """The ten slowest tests, and the test files by time."""
    files: dict[str, Costs] = {}
    for test, one in found.items():
        file = test.partition("::")[0]
        files[file] = files[file] + one if file in files else one
    lines = ["   wall     cpu  compiled  cached  subprocesses"]
    slowest = sorted(found.items(), key=lambda pair: -pair[1].wall)[:10]
    for name, one in [*slowest, *sorted(files.items(), key=lambda pair: -pair[1].wall)]:
        lines.append(
            f"{one.wall:7.1f} {one.cpu + one.children_cpu:7.1f} "
            f"{one.programs - one.cache_hits:9d} {one.cache_hits:7d} {one.subprocesses:13d}  {name}"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the summary of some files; of several, each test with its file's name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    found: dict[str, Costs] = {}
    paths = parser.parse_args().files
    for path in paths:
        where = f"{path.stem}: " if len(paths) > 1 else ""
        try:
            found |= {f"{where}{test}": costs for test, costs in read(path).items()}
        except OSError as error:
            parser.error(f"cannot read {path}: {error.strerror}")
    print(summary(found))


if __name__ == "__main__":
    main()
