# SPDX-License-Identifier: Apache-2.0
"""How many sequences, and how long ones, the memory for the KV cache has room for."""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from meshwen.cache.kv_cache import cache_bytes_per_token
from meshwen.errors import MeshwenError
from meshwen.parallel.mesh import AnyMesh
from meshwen.parallel.plan import ParallelPlan
from meshwen.runtime.jax_settings import own_settings
from meshwen.runtime.shape_buckets import largest_bucket, power_of_two

# Of a device's free memory, what the cache may take; the rest is for what the steps compute.
_CACHE_SHARE = 0.8


@dataclass(frozen=True)
class Capacity:
    """What an engine may hold.

    Attributes:
        max_num_seqs: the most sequences that run at once; where the batch has more parts, as many
            as parts.
        max_model_len: the most tokens of a sequence, prompt and answer.
        parts: of the batch; each has equally many sequences.
        token_bytes: of the cache, for a token of one sequence, on a device.
        cache_bytes: that the cache may take on a device.
    """

    max_num_seqs: int
    max_model_len: int
    parts: int
    token_bytes: int
    cache_bytes: int

    @classmethod
    def of(
        cls,
        plan: ParallelPlan,
        dtype: jnp.dtype,
        max_num_seqs: int,
        max_model_len: int | None = None,
    ) -> Capacity:
        """What the devices' free memory has room for; to be asked when the weights are there.

        Args:
            plan: the model on its mesh.
            dtype: of cached values.
            max_num_seqs: the most sequences that may run at once.
            max_model_len: the most tokens of a sequence; None: the model's context.

        Raises:
            MeshwenError: `max_num_seqs` or `max_model_len` is impossible.
        """
        context = plan.config.context_length
        length = context if max_model_len is None else max_model_len
        if not 2 <= length <= context:
            raise MeshwenError(
                f"max_model_len must be from 2 to the model's context of {context}, not {length}"
            )
        if max_num_seqs < 1:
            raise MeshwenError(f"max_num_seqs must be at least 1, not {max_num_seqs}")
        token_bytes = cache_bytes_per_token(plan.config, plan.heads.local_key_value_heads, dtype)
        several = plan.mesh.is_multi_process
        free = _least_free_bytes(plan.mesh) if several else free_bytes(plan.mesh.local_devices)
        cache_bytes = int(_CACHE_SHARE * free)
        return cls(max_num_seqs, length, plan.data_devices, token_bytes, cache_bytes)

    @property
    def longest(self) -> int:
        """The longest cache, a bucket, that has room for one sequence on each part; or 0."""
        return largest_bucket(self.cache_bytes // self.token_bytes)

    def rows(self, count: int, length: int) -> int:
        """Rows of a cache for `count` sequences, fewer where memory is short.

        Each part of the batch has a power of two of them, unless that is more than may run.

        Args:
            count: sequences that could run at once.
            length: slots of the cache.

        Raises:
            MeshwenError: not even one sequence on each part fits.
        """
        most = ceil(self.max_num_seqs / self.parts)
        rows = min(power_of_two(ceil(count / self.parts)), most)
        fitting = self.cache_bytes // (self.token_bytes * length)
        if not fitting:
            raise MeshwenError(
                f"a sequence of {length} tokens needs {self.token_bytes * length / 1e9:.2f} GB of "
                f"KV cache on a device, of which {self.cache_bytes / 1e9:.2f} GB can be had: lower "
                "max_new_tokens or max_model_len, or use more devices"
            )
        while rows > fitting:
            rows = power_of_two(rows) // 2
        return rows * self.parts

    def holds(self, *caches: tuple[int, int]) -> bool:
        """Whether caches of so many (rows, slots) fit at the same time."""
        slots = sum(rows // self.parts * length for rows, length in caches)
        return slots * self.token_bytes <= self.cache_bytes


@own_settings()
def _least_free_bytes(mesh: AnyMesh) -> int:
    """The least of several processes: what they decide from it has to be the same."""
    host = zlib.crc32(socket.gethostname().encode()) % (1 << 24)  # What float32 holds exactly.
    own = np.array([free_bytes(mesh.local_devices), host], np.float32)
    free, hosts = process_allgather(own).T
    if mesh.local_devices[0].platform == "cpu":  # A machine's processes share its memory.
        free = free / [np.count_nonzero(hosts == one) for one in hosts]
    return int(free.min())


def free_bytes(devices: Sequence[jax.Device]) -> int:
    """Bytes that are free on the fullest of some devices."""
    free = []
    for device in devices:
        stats = device.memory_stats()
        if stats and "bytes_limit" in stats:
            free.append(stats["bytes_limit"] - stats["bytes_in_use"])
    # Devices of the CPU share the machine's memory.
    return min(free) if free else _free_host_bytes() // len(devices)


def _free_host_bytes() -> int:
    """Memory that can be had without swapping; where the system does not tell, what there is."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            sizes = dict(line.split(":") for line in lines)
        free = int(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([free, *_control_groups_leave()])


def _control_groups_leave(
    own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Bytes that each limit on this process leaves it, as a container has one (Linux cgroups)."""
    try:
        groups = re.findall(r"^(\d+):([^:\n]*):/?(.*)$", own.read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return
    for number, controllers, path in groups:
        if number == "0":
            yield from _groups_leave(root, path, "max", "current", "")
        elif "memory" in controllers.split(","):
            yield from _groups_leave(
                root / "memory", path, "limit_in_bytes", "usage_in_bytes", "total_"
            )


def _groups_leave(root: Path, path: str, most: str, now: str, files: str) -> Iterator[int]:
    """What the limits of a group and of those above it leave.

    Args:
        root: where the hierarchy is mounted.
        path: of the group; a container may see no more than its own, as the root.
        most, now: how cgroup v1 or v2 calls a limit, and what is used.
        files: what stands before the names of the cache of files, the groups' below included.
    """
    folder = root / path
    for group in [folder, *folder.parents[: len(folder.parts) - len(root.parts)]]:
        try:
            limit, used = (int((group / f"memory.{n}").read_text()) for n in (most, now))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = sum(int(stat[f"{files}{kind}_file"]) for kind in ("active", "inactive"))
        except (OSError, ValueError, KeyError):  # No such controller here, or its limit is "max".
            continue
        # The cache of files is given up where memory is asked for.
        yield max(0, limit - used + cached)
