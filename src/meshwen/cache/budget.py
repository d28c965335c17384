# SPDX-License-Identifier: Apache-2.0
"""How many sequences, and how long ones, the memory for the KV cache has room for."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor
from typing import Self

from jax.sharding import Mesh

from meshwen.common.units import bytes_text
from meshwen.errors import MeshwenError
from meshwen.parallel.plan import ParallelPlan
from meshwen.runtime.memory import free_bytes_of_mesh
from meshwen.runtime.shape_buckets import largest_shape_bucket

# Of a device's free memory, what the cache may take; the rest is for what the steps compute.
_CACHE_SHARE = 0.8
# Tokens of a sequence for which there must be room.
_FEWEST_TOKENS = 64


@dataclass(frozen=True)
class KVCachePlan:
    """How many KV blocks a cache has, and what they have room for.

    Attributes:
        num_blocks: of each part of the batch, the null block included.
        block_size: positions of a block.
        token_bytes: of a position, on a device.
        parts: of the batch.
        max_num_seqs: the most sequences that run at once; where the batch has more parts, as many
            as parts.
        max_model_len: the most tokens of a sequence, prompt and answer.
    """

    num_blocks: int
    block_size: int
    token_bytes: int
    parts: int
    max_num_seqs: int
    max_model_len: int

    @classmethod
    def of_memory(
        cls,
        plan: ParallelPlan,
        token_bytes: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        kv_cache_memory: int | float | None = None,
    ) -> Self:
        """As many blocks as fit: call it when the weights are there.

        More than all sequences may need keep prefixes, where memory is given. Where free memory
        decides, a shape bucket of blocks: where that differs a little between two runs, the
        programs are those compiled before.

        Args:
            plan: of the model.
            token_bytes, block_size, max_num_seqs, max_model_len: the attributes.
            kv_cache_memory: bytes on each device (an int), or a share of what is free there (a
                float above 0 and at most 1); None: what all sequences may need, at most 0.8.

        Raises:
            MeshwenError: hardly a sequence fits; or free memory is asked for, and the plan's mesh
                is abstract.
        """
        sizes = block_size, token_bytes, plan.data_devices, max_num_seqs, max_model_len
        sequences = ceil(max_num_seqs / plan.data_devices)
        needed = sequences * ceil(max_model_len / block_size) + 1
        if isinstance(kv_cache_memory, int):
            cache_bytes = kv_cache_memory
        else:
            share = _CACHE_SHARE if kv_cache_memory is None else kv_cache_memory
            cache_bytes = int(share * _free_bytes(plan))
        fitting = cache_bytes // (token_bytes * block_size)
        fewest = min(max_model_len, _FEWEST_TOKENS)
        if not isinstance(kv_cache_memory, int):
            bucket = largest_shape_bucket(fitting)
            if fitting >= needed:
                fitting = max(bucket, needed)
            elif bucket > ceil(fewest / block_size):
                fitting = bucket
        if kv_cache_memory is None:
            fitting = min(fitting, needed)
        found = cls(fitting, *sizes)
        found.check_fits(fewest)
        return found

    @property
    def capacity(self) -> int:
        """Positions of one part."""
        return max(self.num_blocks - 1, 0) * self.block_size

    @property
    def longest(self) -> int:
        """The most tokens of a sequence that a part has room for, when alone there."""
        return min(self.max_model_len, self.capacity)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, of all layers, on a device."""
        return self.block_size * self.token_bytes

    @property
    def bytes(self) -> int:
        """Bytes of the cache on each device."""
        return self.num_blocks * self.block_bytes

    def check_fits(self, length: int) -> None:
        """Refuses a sequence that is too long for a part to itself.

        Args:
            length: its tokens, prompt and answer.

        Raises:
            MeshwenError: saying what it needs.
        """
        if length > self.capacity:
            needed = (ceil(length / self.block_size) + 1) * self.block_bytes
            raise MeshwenError(
                f"a sequence of {length} tokens needs {bytes_text(needed)} of KV cache on a "
                f"device, of which {bytes_text(self.bytes)} can be had: lower max_new_tokens or "
                "max_model_len, raise kv_cache_memory, or use more devices"
            )

    def __str__(self) -> str:
        """On one line."""
        many = f"{self.parts} x " if self.parts > 1 else ""
        tokens = self.parts * self.capacity
        sequences = floor(10 * tokens / self.max_model_len) / 10
        return (
            f"KV cache: {many}{self.num_blocks - 1:,} blocks of {self.block_size} tokens, "
            f"{bytes_text(self.bytes)} on each device; room for {tokens:,} tokens, "
            f"{sequences:,.1f} sequences of {self.max_model_len:,}"
        )


def _free_bytes(plan: ParallelPlan) -> int:
    """Bytes that are free on the fullest device."""
    if not isinstance(plan.mesh, Mesh):
        raise MeshwenError(
            f"no device is behind {plan.mesh}, so there is no memory for a KV cache: give "
            "the model a mesh of devices (meshwen.parallel.mesh.make_mesh)"
        )
    return free_bytes_of_mesh(plan.mesh)
