# SPDX-License-Identifier: Apache-2.0
"""Why this machine can have no kernels, if so; found without asking them."""

import platform
from importlib.util import find_spec

import pytest


def _reason() -> str:
    if platform.machine() != "x86_64":
        return f"kernels are for x86 CPUs, not {platform.machine()}"
    if not find_spec("llvmlite"):
        return "the extra cpu is not installed"
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    missing = [name for name in ("avx2", "fma") if not features.get(name)]
    return f"this CPU has no {' and no '.join(missing)}" if missing else ""


# Where nothing is missing, tests run, and fail if the kernels do not compile.
needs_kernels = pytest.mark.skipif(bool(_reason()), reason=_reason())
