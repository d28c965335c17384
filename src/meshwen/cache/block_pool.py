# SPDX-License-Identifier: Apache-2.0
"""The KV blocks of one part of the batch: which are in use, which are free, and what is in them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

NULL_BLOCK = 0  # Fills unused entries of tables and copies; no sequence has it.


class BlockPool:
    """Counts the references to blocks, and finds full ones by the digest of what they hold.

    A block is in use while it has references. After its last one it is free; but where it has a
    digest it is still found by that, until it is evicted: the least recently used goes first, and
    only when no block is free otherwise. Every operation takes constant time for a block.

    Args:
        num_blocks: the null block included.

    Attributes:
        num_blocks: the same.
        evictions: blocks evicted since the pool was made.
    """

    def __init__(self, num_blocks: int):
        assert num_blocks > NULL_BLOCK
        self.num_blocks = num_blocks
        self.evictions = 0
        self.clear()

    def clear(self) -> None:
        """Makes all blocks free, and forgets what is in them."""
        self._references = [0] * self.num_blocks
        self._digests: list[bytes | None] = [None] * self.num_blocks
        self._named: dict[bytes, int] = {}  # The block that has a digest.
        self._free = list(range(self.num_blocks - 1, NULL_BLOCK, -1))  # The last is taken first.
        self._evictable: OrderedDict[int, None] = OrderedDict()  # The first is evicted first.

    @property
    def free_blocks(self) -> int:
        """Blocks that `allocate` could give out: free or evictable."""
        return len(self._free) + len(self._evictable)

    @property
    def used_blocks(self) -> int:
        """Blocks that have references."""
        return self.num_blocks - 1 - self.free_blocks

    def allocate(self, count: int) -> list[int] | None:
        """Blocks with one reference and no digest; None, and nothing done, for lack of them."""
        if count > self.free_blocks:
            return None
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def acquire(self, block: int) -> None:
        """Adds a reference to a block that has some, or that `find` found."""
        if not self._references[block]:
            del self._evictable[block]
        self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Takes a reference from each block of a sequence, given in the sequence's order.

        The last goes first, and so is evicted first: nothing finds a block without those before it.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._digests[block] is None:
                self._free.append(block)
            else:
                self._evictable[block] = None

    def references(self, block: int) -> int:
        """How many have the block."""
        return self._references[block]

    def digest(self, block: int) -> bytes | None:
        """By which the block is found; None where it is not."""
        return self._digests[block]

    def name(self, block: int, digest: bytes) -> None:
        """Makes a block in use findable, unless another block has the digest."""
        if self._named.setdefault(digest, block) == block:
            self._digests[block] = digest

    def find(self, digest: bytes) -> int | None:
        """The block that has a digest. It may be evicted until `acquire` has taken it."""
        return self._named.get(digest)

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of some blocks have no reference."""
        return sum(not self._references[block] for block in blocks)

    def check(self, references: Mapping[int, int]) -> None:
        """Holds the pool to its invariants.

        Args:
            references: that there are to each block, where there are any.

        Raises:
            AssertionError: saying which one is broken.
        """
        for block in range(self.num_blocks):
            found, expected = self._references[block], references.get(block, 0)
            assert found == expected, f"block {block} counts {found} references, not {expected}"
        used = [block for block in range(self.num_blocks) if self._references[block]]
        states = sorted([NULL_BLOCK, *used, *self._free, *self._evictable])
        assert states == [*range(self.num_blocks)], f"not one state for each block: {states}"
        named = {block: d for block, d in enumerate(self._digests) if d is not None}
        assert {d: block for block, d in named.items()} == self._named, "the index is another"
        assert len(named) == len(self._named), "two blocks have one digest"
        assert NULL_BLOCK not in named, "the null block has a digest"
        for block in self._free:
            assert block not in named, f"free block {block} has a digest"
        for block in self._evictable:
            assert block in named, f"evictable block {block} has no digest"

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        digest = self._digests[block]
        assert digest is not None
        del self._named[digest]
        self._digests[block] = None
        self.evictions += 1
        return block
