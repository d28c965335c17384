# SPDX-License-Identifier: Apache-2.0
"""One run over several processes, on one machine or many: `jax.distributed`.

Every process runs the same program on the same input, and each computes with its own devices. Where
a process reads something that only it can see, or needs a value that lies on another's devices,
they exchange it here. With one process nothing is exchanged.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import jax
import numpy as np
from jax import Array

from meshwen.errors import MeshwenError
from meshwen.parallel import rendezvous
from meshwen.runtime.jax_settings import own_settings
from meshwen.runtime.jax_versions import no_preemption_service

AUTO = "auto"
START_TIMEOUT = 60.0  # seconds, for all processes to come

# Seconds after which a silent process counts as dead; JAX then ends the others.
_HEARTBEAT_TIMEOUT = 20
# How long a process that failed waits for the others to fail alike, before it leaves them behind.
_LEAVING_TIMEOUT = 3.0
_LEAST_TO_INITIALIZE = 20.0  # seconds, once all have come
_LONG = 7 * 24 * 3600  # seconds
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def start(
    coordinator: str,
    processes: int | None = None,
    index: int | None = None,
    timeout: float = START_TIMEOUT,
) -> None:
    """Joins this process to the others; to be called before JAX has started its back end.

    Args:
        coordinator: HOST:PORT, where process 0 listens; "auto" asks the cluster (Slurm, Open MPI,
            Kubernetes, a TPU slice) for all three.
        processes: number of processes.
        index: this process's number, from 0.
        timeout: seconds to wait for the others.

    Raises:
        MeshwenError: an argument is impossible, there is no cluster to ask, process 0 does not
            answer, not all processes came in time, or they differ in how many there are, or two
            have the same number.
    """
    if coordinator == AUTO:
        if processes is not None or index is not None:
            raise MeshwenError("a coordinator 'auto' knows the number of processes, and each id")
        _initialize({}, f"the cluster's processes did not all come within {timeout:.0f} s", timeout)
        return
    host = _host_of(coordinator)
    if processes is None or index is None:
        raise MeshwenError(
            f"coordinator {coordinator}: the number of processes, or this one's id, is missing; "
            "give both"
        )
    if not 0 <= index < processes:
        raise MeshwenError(
            f"process id {index} is impossible among {processes}: ids go from 0 to the number of "
            "processes less one"
        )
    options: dict[str, Any] = {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }
    if host in _LOOPBACK:  # Then no other machine need reach it.
        options["coordinator_bind_address"] = coordinator
    deadline = time.monotonic() + timeout
    if index == 0:
        rendezvous.gather(coordinator, processes, timeout)
    else:
        rendezvous.join(coordinator, processes, index, timeout)
        rendezvous.wait_for_listener(coordinator, timeout)
    with _no_proxy(host.strip("[]")):
        _initialize(
            options,
            f"{coordinator}: not all of the {processes} processes started JAX within "
            f"{timeout:.0f} s; look at their messages",
            max(_LEAST_TO_INITIALIZE, deadline - time.monotonic()),
        )


def process_count() -> int:
    """Number of processes; unlike `jax.process_count()` this starts no back end."""
    return int(_state().num_processes)


def process_index() -> int:
    """This process's number; unlike `jax.process_index()` this starts no back end."""
    return int(_state().process_id)


def shared(name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives in process 0, which alone calls it; the others wait for that.

    Args:
        name: of the value, the same in every process; all share the same ones, in one order.
        make: gives a value that JSON can hold.

    Raises:
        MeshwenError: `make` raised it, in every process. Of another exception the others get the
            text.
    """
    if process_count() == 1:
        return make()
    client, key = _state().client, _new_key(name)
    if process_index():
        found = json.loads(client.blocking_key_value_get(key, _LONG * 1000))
        if "error" in found:
            raise MeshwenError(found["error"])
        return found["value"]
    try:
        value = make()
        text = json.dumps({"value": value})
    except BaseException as error:
        name = "" if isinstance(error, MeshwenError) else f"process 0: {type(error).__name__}: "
        client.key_value_set(key, json.dumps({"error": f"{name}{error}"}))
        raise
    client.key_value_set(key, text)
    return value


def gathered(name: str, value: Any) -> list[Any]:
    """The `value` of every process, in their order.

    Args:
        name: as for `shared`.
        value: what JSON can hold; it comes back as that does.
    """
    text = json.dumps(value)
    if process_count() == 1:
        return [json.loads(text)]
    client, key = _state().client, _new_key(name)
    client.key_value_set(f"{key}/{process_index()}", text)
    found = (
        client.blocking_key_value_get(f"{key}/{index}", _LONG * 1000)
        for index in range(process_count())
    )
    values = [json.loads(one) for one in found]
    _forget_before(key)
    return values


# How many exchanges there were: JAX wants a new name for each.
_exchanges = itertools.count()
_kept: list[str] = []  # The names of those that are still in the store, oldest first.


def _new_key(name: str) -> str:
    _kept.append(f"meshwen/{next(_exchanges)} {name}")
    return _kept[-1]


def _forget_before(key: str) -> None:
    """Removes older exchanges from the store, which would grow without bound.

    Every process has given its value for `key`, so none has still to read one before it.
    """
    while _kept[0] != key:
        older = _kept.pop(0)
        if process_index() == 0:
            _state().client.key_value_delete(older)


@own_settings()
def to_host(array: Array) -> np.ndarray:
    """An array's values, wherever they lie; every process has to ask for them."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def wait_for_others() -> None:
    """Leaves the others once all have come this far. Returns at once where there are none."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def leave(status: int) -> None:
    """Ends a process that failed while others run: at once, not when those are done.

    Those end too: when they miss it, or when they fail alike. Returns where there are no others.
    """
    if not jax.distributed.is_initialized():
        return
    leaving = threading.Thread(target=_shut_down, daemon=True)
    leaving.start()
    leaving.join(_LEAVING_TIMEOUT)
    _exit(status)


def _shut_down() -> None:
    with suppress(RuntimeError):
        jax.distributed.shutdown()


def _exit(status: int) -> NoReturn:
    """Without what JAX does at exit: it would wait for the others."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _state() -> Any:
    """What JAX knows of the processes: their number, this one's, and the client of their store."""
    # Not public, yet the only way: `jax.process_count` and `jax.experimental.multihost_utils` start
    # the back end, whose simulated devices depend on the number, and nothing else hands out the
    # store. It is what JAX's own checkpointing reads.
    from jax._src import distributed

    return distributed.global_state


def _host_of(coordinator: str) -> str:
    host, _, port = coordinator.rpartition(":")
    if not host or not re.fullmatch(r"\d{1,5}", port) or not 0 < int(port) < 1 << 16:
        raise MeshwenError(
            f"coordinator {coordinator!r} is no address; expected HOST:PORT, e.g. 10.0.0.1:1234"
        )
    return host


@contextmanager
def _no_proxy(host: str) -> Iterator[None]:
    """Has gRPC connect to a host itself: it would ask a proxy that the environment names."""
    proxies = ("grpc_proxy", "https_proxy", "http_proxy")
    if not any(os.environ.get(name) for name in proxies):  # gRPC reads no others.
        yield
        return
    names = ("no_grpc_proxy", "no_proxy")
    before = {name: os.environ.get(name) for name in names}
    direct = ",".join(filter(None, (before["no_grpc_proxy"] or before["no_proxy"], host)))
    warns = jax.config.values["jax_check_proxy_envs"]
    os.environ.update(dict.fromkeys(names, direct))
    jax.config.update("jax_check_proxy_envs", False)
    try:
        yield
    finally:
        jax.config.update("jax_check_proxy_envs", warns)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _initialize(options: dict[str, Any], too_late: str, timeout: float) -> None:
    """`jax.distributed.initialize`, in a thread: at its own timeout it ends the process."""
    failures: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                **options,
                initialization_timeout=_LONG,
                heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            )
        except Exception as error:
            failures.append(error)

    connecting = threading.Thread(target=connect, daemon=True)
    with no_preemption_service():
        connecting.start()
        connecting.join(max(1.0, timeout))
    if connecting.is_alive():
        raise MeshwenError(too_late)
    if failures and not options and isinstance(failures[0], ValueError):
        raise MeshwenError(
            f"coordinator 'auto': JAX finds no cluster here ({failures[0]}); give HOST:PORT, the "
            "number of processes and this one's id"
        )
    if failures:
        raise MeshwenError(f"cannot join the other processes: {failures[0]}") from failures[0]
