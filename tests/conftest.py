# SPDX-License-Identifier: Apache-2.0
"""What several test files need: simulated devices, the real checkpoint, the reference outputs."""

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

# The largest mesh that is tested. JAX makes its devices when the first array is made, once.
jax.config.update("jax_num_cpu_devices", 32)

SHARED = Path(__file__).resolve().parents[2] / "shared"
FETCH = SHARED / "real-model" / "fetch"
REAL_MODEL = "qwen2.5-coder-0.5b-instruct"


@pytest.fixture(scope="module", autouse=True)
def _give_memory_back():
    """After each file: programs add up, and the C library keeps what small arrays took."""
    yield
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def pytest_collection_modifyitems(items):
    """Files with slow tests first: several processes share the files in this order."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


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
