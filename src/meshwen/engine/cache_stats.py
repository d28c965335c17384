# SPDX-License-Identifier: Apache-2.0
"""How full an engine's KV cache is, and what prefix caching does for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from meshwen.cache.block_manager import BlockManager
from meshwen.cache.budget import KVCachePlan


@dataclass(frozen=True)
class CacheStats:
    """The KV cache at one moment; counts are since the engine was made.

    Attributes:
        used_blocks: KV blocks that sequences have now, in all parts of the batch.
        total_blocks: that there are.
        queried_tokens: of sequences that were looked up in the cache.
        cached_tokens: of these, those that were found.
        evictions: blocks of prefixes that had to go for others.
        preemptions: how often a sequence gave its blocks back, to be computed again later.
    """

    used_blocks: int
    total_blocks: int
    queried_tokens: int
    cached_tokens: int
    evictions: int
    preemptions: int

    @classmethod
    def of(cls, blocks: BlockManager, plan: KVCachePlan, preemptions: int) -> Self:
        """Of an engine's blocks."""
        stats, total = blocks.stats, plan.parts * (plan.num_blocks - 1)
        return cls(
            blocks.used_blocks,
            total,
            stats.queried_tokens,
            stats.cached_tokens,
            stats.evictions,
            preemptions,
        )
