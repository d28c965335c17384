# SPDX-License-Identifier: Apache-2.0
"""What differs between the versions of jax that the package runs on; each entry says which.

Nowhere else does the package's code ask for a version, but in `meshwen.runtime.jax_settings`, which
refuses one that gives wrong results.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from typing import Any

import jax
import jax.experimental


def jaxlib_version() -> str:
    """The version of jaxlib, which has XLA: it need not be that of jax."""
    return metadata.version("jaxlib")


def _at_least(version: str, *numbers: int) -> bool:
    """Whether a version such as 0.9.0.1 or 0.10.0rc1 begins with these numbers, or higher ones."""
    return tuple(map(int, re.findall(r"\d+", version)[:3])) >= numbers


# jax 0.7 has the context manager in jax.experimental, 0.8 and later in jax.
_owner: Any = jax if _at_least(jax.__version__, 0, 8) else jax.experimental
enable_x64: Callable[[bool], AbstractContextManager[None]] = _owner.enable_x64


def multiplies_by_ynnpack() -> bool:
    """Whether XLA on CPUs multiplies by YNNPACK, and has the option that says what goes there.

    jaxlib 0.8.1 and later do. Before, all goes to Eigen.
    """
    return _at_least(jaxlib_version(), 0, 8, 1)


@contextmanager
def no_preemption_service() -> Iterator[None]:
    """Keeps `jax.distributed.initialize` from taking SIGTERM, which then would not end the process.

    jax 0.8.2 and later have a setting for it. Before, what Python had done with the signal is done
    again afterwards, which only the main thread can.
    """
    if _at_least(jax.__version__, 0, 8, 2):
        jax.config.update("jax_enable_preemption_service", False)
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
