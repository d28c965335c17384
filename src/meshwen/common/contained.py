# SPDX-License-Identifier: Apache-2.0
"""Untrusted programs, run in processes of their own with limits on time and memory.

A checkpoint brings programs: a chat template, and a tokenizer's patterns and steps. Only a process
limits them reliably: one comparison of nested lists, one regular expression or one padded string
can take hours or all memory inside a single C call that no thread can interrupt, and a panic of the
tokenizers library writes to the process's own stderr.

It is a plain subprocess that exchanges lines of JSON. The pools of `multiprocessing`, and what
builds on it, import the user's main script again, which fails where that script has no
`if __name__ == "__main__"`, and unpickle what the untrusted side sends.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshwen.errors import MeshwenError

TIME_LIMIT_S = 10.0
MEMORY_LIMIT_BYTES = 1 << 30


class Contained:
    """A process that answers requests; `contained_worker.py` is its side.

    It starts at the first request (under 0.1 s), answers the later ones in well under a
    millisecond, and ends with this object. Safe to use from several threads.
    """

    def __init__(self, module: str, name: str, setup: Mapping[str, Any] | None = None):
        """Choose what to run.

        Args:
            module: its `main` answers requests: `meshwen.tokenizer.chat_template_worker`.
            name: what runs there, for messages: "the chat template".
            setup: the first request to each new process.
        """
        self._module = module
        self._name = name
        self._setup = setup
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the reply to a request.

        Raises:
            MeshwenError: the request is not plain JSON; it failed; it exceeds the limits on time
                or memory; the process cannot start.
        """
        line = self._line(request)
        with self._lock:
            if self._worker is None or self._worker.poll() is not None:
                self._start()
            return self._exchange(line)

    def _line(self, request: Mapping[str, Any]) -> bytes:
        try:
            return json.dumps({**request, "seconds": TIME_LIMIT_S}).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise MeshwenError(f"{self._name} needs plain JSON values: {error}") from error

    def _start(self) -> None:
        self._worker = _started(self._module, self._name)
        self._stop = weakref.finalize(self, _stop_worker, self._worker)
        if self._setup is not None:
            try:
                self._exchange(self._line(self._setup))
            except MeshwenError:
                self._stop()
                self._worker = None
                raise

    def _exchange(self, line: bytes) -> dict[str, Any]:
        """Send one request and read its reply; end the process where there is none."""
        assert self._worker is not None
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        reply = b""
        try:
            self._worker.stdin.write(line)
            self._worker.stdin.flush()
            reply = self._worker.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            # Also after Ctrl-C: an unread reply would be taken for the next request's.
            if not reply:
                self._stop()
                self._worker = None
        if not reply:
            raise MeshwenError(
                f"{self._name} was stopped: it ran for more than {TIME_LIMIT_S:g} s or grew "
                f"beyond {MEMORY_LIMIT_BYTES >> 20} MiB"
            )
        answer: dict[str, Any] = json.loads(reply)
        if "error" in answer:
            raise MeshwenError(f"{self._name} failed: {answer['error']}")
        return answer


def _started(module: str, name: str) -> subprocess.Popen[bytes]:
    here = str(Path(__file__).resolve().parents[1])
    search_path = os.pathsep.join([*filter(None, sys.path), here])
    try:
        worker = subprocess.Popen(
            # -P keeps the working directory's modules out; PYTHONPATH replaces -S's site.
            [sys.executable, "-S", "-P", "-m", module, str(MEMORY_LIMIT_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": search_path, "TOKENIZERS_PARALLELISM": "false"},
        )
        assert worker.stdout is not None
        if worker.stdout.readline():
            return worker
        problem = f"it ended with status {worker.wait()}"
    except OSError as error:
        problem = str(error)
    raise MeshwenError(f"cannot start the process that runs {name} ({sys.executable}): {problem}")


def _stop_worker(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    # Closing the pipe of a process that died early reports the bytes it did not read.
    with contextlib.suppress(OSError), worker:
        pass
