# SPDX-License-Identifier: Apache-2.0
"""Memory that is free: on devices, on this machine, and within a container's limits."""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh

from meshwen.runtime.jax_settings import own_settings


def free_bytes(devices: Sequence[jax.Device]) -> int:
    """Bytes that are free on the fullest of some devices."""
    free = []
    for device in devices:
        stats = device.memory_stats()
        if stats and "bytes_limit" in stats:
            free.append(stats["bytes_limit"] - stats["bytes_in_use"])
    # Devices of the CPU share the machine's memory.
    return min(free) if free else _free_host_bytes() // len(devices)


def free_bytes_of_mesh(mesh: Mesh) -> int:
    """Bytes that are free on the fullest device of a mesh, whichever process it belongs to.

    What several processes decide from it has to be the same: all of them call this.
    """
    if mesh.is_multi_process:
        return _least_of_all_processes(mesh.local_devices)
    return free_bytes(mesh.local_devices)


@own_settings()
def _least_of_all_processes(local_devices: Sequence[jax.Device]) -> int:
    host = zlib.crc32(socket.gethostname().encode()) % (1 << 24)  # What float32 holds exactly.
    own = np.array([free_bytes(local_devices), host], np.float32)
    free, hosts = process_allgather(own).T
    if local_devices[0].platform == "cpu":  # A machine's processes share its memory.
        free = free / [np.count_nonzero(hosts == one) for one in hosts]
    return int(free.min())


def _free_host_bytes() -> int:
    """Memory available without swapping; all of the machine's where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            sizes = dict(line.split(":") for line in lines)
        free = int(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([free, *_free_bytes_of_cgroups()])


def _free_bytes_of_cgroups(
    own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Bytes left below each limit on this process, as a container has one (Linux cgroups)."""
    try:
        groups = re.findall(r"^(\d+):([^:\n]*):/?(.*)$", own.read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return
    for number, controllers, path in groups:
        if number == "0":
            yield from _free_bytes_of_hierarchy(root, path, "max", "current", "")
        elif "memory" in controllers.split(","):
            yield from _free_bytes_of_hierarchy(
                root / "memory", path, "limit_in_bytes", "usage_in_bytes", "total_"
            )


def _free_bytes_of_hierarchy(
    root: Path, path: str, limit_name: str, usage_name: str, prefix: str
) -> Iterator[int]:
    """Bytes left below the limits of a group and of those above it.

    Args:
        root: where the hierarchy is mounted.
        path: of the group; a container may see no more than its own, as the root.
        limit_name, usage_name: what cgroup v1 or v2 calls a limit, and what is used.
        prefix: of the names of the file cache's sizes, the groups' below included.
    """
    folder = root / path
    for group in [folder, *folder.parents[: len(folder.parts) - len(root.parts)]]:
        try:
            limit, used = (
                int((group / f"memory.{name}").read_text()) for name in (limit_name, usage_name)
            )
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = sum(int(stat[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
        except (OSError, ValueError, KeyError):  # No such controller here, or its limit is "max".
            continue
        # The file cache is given up where memory is asked for.
        yield max(0, limit - used + cached)
