# SPDX-License-Identifier: Apache-2.0
"""What tests need of this machine and its jax: kernels, found without asking them; YNNPACK."""

import os
import platform
from pathlib import Path

import pytest

from meshwen.runtime.jax_versions import jaxlib_version, multiplies_by_ynnpack


def _reason() -> str:
    if os.environ.get("MESHWEN_INSTRUCTION_SET") == "none":
        return "the kernels are switched off"
    machine, flags = platform.machine().lower(), Path("/proc/cpuinfo")
    if machine in ("aarch64", "arm64"):
        return ""
    if machine not in ("x86_64", "amd64"):
        return f"kernels are for x86-64 and ARM CPUs, not {machine}"
    if flags.exists() and "avx2" not in flags.read_text().split():
        return "this CPU has no AVX2"
    return ""


# Where nothing is missing, tests run, and fail if there are no kernels.
needs_kernels = pytest.mark.skipif(bool(_reason()), reason=_reason())

needs_ynnpack = pytest.mark.skipif(
    not multiplies_by_ynnpack(),
    reason=f"jaxlib {jaxlib_version()}: XLA's bfloat16 matmuls have one order from 0.8.1 on",
)
