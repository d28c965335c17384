# SPDX-License-Identifier: Apache-2.0
"""What tests share: simulated devices, compiled programs, real checkpoint, reference outputs."""

import ctypes
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jaxtyping
import pytest

import costs
from meshwen.runtime.compilation_cache import enable_compilation_cache

# The largest mesh that is tested. JAX makes its devices when the first array is made, once.
jax.config.update("jax_num_cpu_devices", 32)

# Modules whose arrays are checked against the shapes and dtypes that their signatures declare.
SHAPED = [
    "meshwen.engine.logprobs",
    "meshwen.engine.penalties",
    "meshwen.engine.sampling",
    "meshwen.engine.split_vocabulary",
    "meshwen.models.decoder",
    "meshwen.models.qwen2",
    "meshwen.models.qwen3",
    "meshwen.ops.attention",
    "meshwen.ops.backend",
    "meshwen.ops.cache_layout",
    "meshwen.ops.cpu.backend",
    "meshwen.ops.cpu.ordered",
    "meshwen.ops.cpu.xla",
    "meshwen.ops.numerics",
    "meshwen.ops.operations",
    "meshwen.ops.ordered",
    "meshwen.ops.rotary",
    "meshwen.verify.metrics",
]

SHARED = Path(__file__).resolve().parents[2] / "shared"
FETCH = SHARED / "real-model" / "fetch"
REAL_MODEL = "qwen2.5-coder-0.5b-instruct"


def pytest_addoption(parser):
    group = parser.getgroup("meshwen")
    group.addoption("--costs", metavar="FILE", help="write what each test costs, as JSON lines")
    group.addoption(
        "--seconds", type=float, help="end the run, as interrupted, after so many seconds"
    )
    group.addoption(
        "--optimised", action="store_true", help="let XLA optimise the programs of all tests"
    )
    group.addoption(
        "--shapes", action="store_true", help="check arrays against the shapes of signatures"
    )


def pytest_configure(config):
    if config.getoption("shapes"):  # Before the modules are imported.
        jaxtyping.install_import_hook(SHAPED, "beartype.beartype")
    costs.register(config)
    _take_interrupts()
    _keep_programs(config)
    if (seconds := config.getoption("seconds")) is not None:
        if not seconds > 0:
            raise pytest.UsageError(f"--seconds must be above 0, not {seconds}")
        if hasattr(config, "workerinput") or config.getoption("numprocesses", None):
            raise pytest.UsageError("--seconds is for a run in one process: leave out -n")
        config.pluginmanager.register(_Deadline(seconds))


def _take_interrupts():
    """Lets the programs that tests start take SIGINT: a shell's background jobs ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _keep_programs(config):
    """Keeps compiled programs in pytest's cache folder, for the next run, and for all processes.

    Tests thus neither read nor write what the user's own programs keep.
    """
    if not hasattr(config, "workerinput"):  # Workers have the environment of the first process.
        os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
        os.environ["XDG_CACHE_HOME"] = str(_folder_of_programs(config))
    enable_compilation_cache()
    # For programs that do not call this: JAX reads each of its settings from the environment.
    for name in (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    ):
        os.environ[name.upper()] = str(getattr(jax.config, name))


def _folder_of_programs(config):
    try:
        return config.cache.mkdir("programs")
    except (AttributeError, OSError):  # Without pytest's cache, or where it cannot be written.
        folder = Path(tempfile.mkdtemp(prefix="meshwen-programs-"))
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        return folder


class _Deadline:
    """Ends the run after the test in which the time is over: exit status 2, unless none is left."""

    def __init__(self, seconds):
        self._seconds, self._end = seconds, time.monotonic() + seconds
        self._done = 0

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        yield
        self._done += 1
        left = len(item.session.items) - self._done
        if left and time.monotonic() > self._end:
            item.session.shouldstop = f"{left} tests not begun within {self._seconds:g} s"


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    """A failure names itself at once: with several processes, pytest tells of it at the end."""
    if report.failed and hasattr(report, "node"):  # Of a worker, in the process that prints.
        print(f"\nFAILED {report.nodeid}", file=sys.__stderr__, flush=True)


@pytest.fixture(scope="module", autouse=True)
def _give_memory_back():
    """After each file: programs add up, and the C library keeps what small arrays took."""
    yield
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def pytest_collection_modifyitems(config, items):
    """Files with slow tests first where several processes share the files in this order."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module")
def unoptimised(request):
    """Compiles with few of XLA's optimisations, a third faster; `--optimised` switches it off.

    For files that are about what surrounds a program (engine, command line, reports), or that
    compare two programs to a tolerance. Not for exact bits without kernels: XLA then adds up small
    products otherwise.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", not request.config.getoption("optimised"))
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def optimised():
    """Compiles a test's programs as users do, in a file that is `unoptimised`."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def real_model_dir():
    """The Hugging Face folder of the real checkpoint; skips where there is no way to have it."""
    default = Path.home() / ".cache" / "meshwen-real-model"
    cache = Path(os.environ.get("MESHWEN_REAL_MODEL_CACHE") or default)
    if FETCH.is_file():  # Does nothing where the files are already there.
        fetched = subprocess.run(
            [sys.executable, FETCH, "--cache", cache], capture_output=True, text=True, check=False
        )
        if fetched.returncode:
            reason = (fetched.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.fail(f"cannot fetch the real checkpoint: {reason}")
    folder = cache / REAL_MODEL
    if not (folder / "config.json").is_file():
        pytest.skip(f"no real checkpoint at {folder} (set MESHWEN_REAL_MODEL_CACHE)")
    return folder


@pytest.fixture(scope="session")
def shared():
    """The folder of reference data beside the checkout; skips where there is none.

    Where there is one, a file that is not in it is an error of the test that reads it.
    """
    if not SHARED.is_dir():
        pytest.skip(f"no reference data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared):
    """What transformers gives for the real checkpoint, parsed."""
    path = shared / "golden" / f"{REAL_MODEL}.float32.json"
    return json.loads(path.read_text(encoding="utf-8"))
