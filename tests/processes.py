# SPDX-License-Identifier: Apache-2.0
"""Several processes of one run, started by a test."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax

LIMIT = 60  # seconds in which the others stop when a process dies


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def spawn(*arguments) -> subprocess.Popen:
    """A Python that has no device count set."""
    tests = Path(__file__).parent
    unoptimised = jax.config.values["jax_disable_most_optimizations"]  # As in this process.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tests,
        env=environment
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(unoptimised)),
        },
    )


def command(name, port, index, *arguments) -> subprocess.Popen:
    own = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id", index)
    return spawn("-m", "meshwen", name, *arguments, *own)
