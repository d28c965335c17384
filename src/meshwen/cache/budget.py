# SPDX-License-Identifier: Apache-2.0
"""How many sequences, and how long ones, the memory for the KV cache has room for."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Self

from jax.sharding import Mesh

from meshwen.errors import MeshwenError
from meshwen.parallel.plan import ParallelPlan
from meshwen.runtime.memory import free_bytes_of_mesh
from meshwen.runtime.shape_buckets import largest_shape_bucket, power_of_two

# Of a device's free memory, what the cache may take; the rest is for what the steps compute.
_CACHE_SHARE = 0.8


@dataclass(frozen=True)
class CacheBudget:
    """What a KV cache may hold.

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
    def of_free_memory(
        cls, plan: ParallelPlan, token_bytes: int, max_num_seqs: int, max_model_len: int
    ) -> Self:
        """The budget of what the devices have free now: call it when the weights are on them.

        Raises:
            MeshwenError: the plan's mesh is abstract.
        """
        if not isinstance(plan.mesh, Mesh):
            raise MeshwenError(
                f"no device is behind {plan.mesh}, so there is no memory for a KV cache: give "
                "the model a mesh of devices (meshwen.parallel.mesh.make_mesh)"
            )
        cache_bytes = int(_CACHE_SHARE * free_bytes_of_mesh(plan.mesh))
        return cls(max_num_seqs, max_model_len, plan.data_devices, token_bytes, cache_bytes)

    @property
    def longest(self) -> int:
        """The longest cache, a shape bucket, with room for one sequence on each part; or 0."""
        return largest_shape_bucket(self.cache_bytes // self.token_bytes)

    def rows(self, count: int, length: int) -> int:
        """Rows of a cache for `count` sequences, fewer where memory is short.

        Each part of the batch has a power of two of them, unless that is more than may run.

        Args:
            count: sequences that could run at once.
            length: positions of the cache.

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
        """Whether caches of so many (rows, positions) fit at the same time."""
        positions = sum(rows // self.parts * length for rows, length in caches)
        return positions * self.token_bytes <= self.cache_bytes
