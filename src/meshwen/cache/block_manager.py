# SPDX-License-Identifier: Apache-2.0
"""Which KV blocks every sequence has, and which of them sequences share.

The blocks themselves are the engine's arrays; here are their numbers alone. A prefix is found by
the digests of its full blocks, each of which covers everything before the block too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import ceil
from struct import Struct
from typing import NamedTuple

from meshwen.cache.block_pool import BlockPool


class Placement(NamedTuple):
    """Where a sequence begins.

    Attributes:
        part: of the batch.
        cached_tokens: its first tokens that are in its blocks, and need not be computed.
    """

    part: int
    cached_tokens: int


@dataclass(frozen=True)
class PrefixCacheStats:
    """What prefix caching has done since the engine began.

    Attributes:
        queried_tokens: of the sequences that were looked up.
        cached_tokens: of these, the ones that were found.
        evictions: blocks that had to go for others.
    """

    queried_tokens: int
    cached_tokens: int
    evictions: int


@dataclass(slots=True)
class _Blocks:
    """Of a sequence: its part, its block table, and how much of it is computed.

    `digests` are those of its first full blocks, behind the `root` that stands for its salt.
    """

    part: int
    table: list[int]
    root: bytes
    digests: list[bytes]
    computed: int


class BlockManager:
    """Gives KV blocks to sequences, each from the pool of its part of the batch.

    A sequence writes to positions from the count of those computed on; blocks before these are
    never written again, so sequences may share them.

    Args:
        parts: of the batch.
        num_blocks: of each part, the null block included.
        block_size: positions of a block.
        prefix_caching: whether a sequence finds blocks that others have computed.
    """

    def __init__(self, parts: int, num_blocks: int, block_size: int, prefix_caching: bool):
        self.block_size, self.prefix_caching = block_size, prefix_caching
        self._pools = [BlockPool(num_blocks) for _ in range(parts)]
        self._tokens = Struct(f"<{block_size}i")
        self._queried = self._found = 0
        self.clear()

    def clear(self) -> None:
        """Forgets all sequences, and all that is in blocks."""
        self._sequences: dict[int, _Blocks] = {}
        self._count = [0] * len(self._pools)  # Sequences of each part.
        for pool in self._pools:
            pool.clear()

    def part(self, sequence: int) -> int:
        """The part of the batch that a sequence is in."""
        return self._sequences[sequence].part

    def table(self, sequence: int) -> list[int]:
        """The blocks of a sequence in order: the list itself, which grows with it."""
        return self._sequences[sequence].table

    def free_blocks(self, part: int) -> int:
        """Blocks of a part that a sequence could get: free or evictable."""
        return self._pools[part].free_blocks

    @property
    def used_blocks(self) -> int:
        """Blocks that sequences have, of all parts."""
        return sum(pool.used_blocks for pool in self._pools)

    @property
    def stats(self) -> PrefixCacheStats:
        """What prefix caching has done."""
        evictions = sum(pool.evictions for pool in self._pools)
        return PrefixCacheStats(self._queried, self._found, evictions)

    def begin(
        self,
        sequence: int,
        tokens: Sequence[int],
        salt: bytes,
        use_cached: bool = True,
        parts: Mapping[int, int] | None = None,
        digests: list[bytes] | None = None,
    ) -> Placement | None:
        """Places a new sequence, with blocks for all its tokens.

        It goes to the part that has fewest sequences, of which each cached block makes up for one:
        a long prefix is worth more than equal parts, a short one less. Of equals, the part with
        most free blocks has it.

        Args:
            sequence: its number.
            tokens: what it begins with. At least one is left to compute, so that something follows.
            salt: sequences share blocks only where theirs are alike.
            use_cached: whether to look for its prefix.
            parts: that may take it, each with how many of its blocks must stay free then; None: all
                parts, to their last block.
            digests: of its first full blocks, as far as they are known. What is computed is added,
                so that who tries again does not pay for it again.

        Returns:
            None where no part has enough blocks; then nothing has changed.
        """
        parts = dict.fromkeys(range(len(self._pools)), 0) if parts is None else parts
        looks = use_cached and self.prefix_caching
        root = _root(salt)
        digests = [] if digests is None else digests
        found = self._find(tokens if looks else (), root, parts, digests)
        total = self._blocks(len(tokens))
        fitting = [
            part
            for part, cached in found.items()
            if self._left(part, cached, total - len(cached)) >= parts[part]
        ]
        if not fitting:
            return None
        part = min(fitting, key=lambda p: (self._count[p] - len(found[p]), -self.free_blocks(p)))
        cached = found[part]
        pool = self._pools[part]
        for block in cached:  # Before any is allocated, which could evict them.
            pool.acquire(block)
        new = pool.allocate(total - len(cached))
        assert new is not None
        length = len(cached) * self.block_size
        self._add(sequence, _Blocks(part, cached + new, root, digests[: len(cached)], length))
        if looks:
            self._queried, self._found = self._queried + len(tokens), self._found + length
        return Placement(part, length)

    def extend(self, sequence: int, length: int, reserve: int = 0) -> bool:
        """Makes a sequence's blocks cover `length` positions.

        Args:
            sequence: its number.
            length: positions.
            reserve: blocks of its part that must stay free if it takes any.

        Returns:
            False where its part has too few free blocks; then nothing has changed.
        """
        own = self._sequences[sequence]
        missing = self._blocks(length) - len(own.table)
        if missing <= 0:
            return True
        if self.free_blocks(own.part) < missing + reserve:
            return False
        blocks = self._pools[own.part].allocate(missing)
        assert blocks is not None
        own.table += blocks
        return True

    def computed(self, sequence: int, tokens: Sequence[int], count: int) -> None:
        """Says that a sequence's first `count` tokens are in its blocks, where others find them.

        They may also come there in the step being scheduled, before its attention: then nothing
        may take the sequence out of that step any more.

        Args:
            sequence: its number.
            tokens: all that it has; only those of blocks that are newly full are read.
            count: never less than before.
        """
        own = self._sequences[sequence]
        own.computed = count
        if not self.prefix_caching:
            return
        digest = own.digests[-1] if own.digests else own.root
        for index in range(len(own.digests), count // self.block_size):
            digest = self._digest(digest, tokens, index)
            self._pools[own.part].name(own.table[index], digest)
            own.digests.append(digest)

    def fork(self, parent: int, child: int, length: int) -> list[tuple[int, int]] | None:
        """Begins a sequence that shares the first `length` positions of another.

        Full blocks are shared. For the rest the child gets a block of its own.

        Args:
            parent: its number.
            child: the new one's.
            length: at most as many positions as `computed` was told of the parent.

        Returns:
            What to copy before either writes: (source block, destination block), at most one; None
            where no block is free, and nothing has changed.
        """
        own = self._sequences[parent]
        pool = self._pools[own.part]
        full = length // self.block_size
        new = pool.allocate(self._blocks(length) - full)
        if new is None:
            return None
        for block in own.table[:full]:
            pool.acquire(block)
        table = own.table[:full] + new
        self._add(child, _Blocks(own.part, table, own.root, own.digests[:full], length))
        return list(zip(own.table[full : full + 1], new, strict=False))

    def free(self, sequence: int) -> None:
        """Takes a sequence's blocks from it; what others may find in them stays while it can."""
        own = self._sequences.pop(sequence)
        self._count[own.part] -= 1
        self._pools[own.part].release(own.table)

    def find(self, tokens: Sequence[int], salt: bytes) -> tuple[int, list[int]]:
        """The part that holds most of the tokens' full blocks, and these; changes nothing.

        Nothing keeps the blocks, unlike those of a sequence: they are good until the next change.
        """
        found = self.find_all(tokens, salt)
        return max(enumerate(found), key=lambda item: len(item[1]))

    def find_all(self, tokens: Sequence[int], salt: bytes) -> list[list[int]]:
        """The same of each part: the tokens' full blocks, up to the first that it lacks."""
        # With a token more, which is the one that a sequence leaves to compute.
        found = self._find([*tokens, 0], _root(salt), range(len(self._pools)), [])
        return [found[part] for part in range(len(self._pools))]

    def check(self) -> None:
        """Holds everything to its invariants, for tests; takes time for every block.

        Raises:
            AssertionError: saying which one is broken.
        """
        references: list[Counter[int]] = [Counter() for _ in self._pools]
        for own in self._sequences.values():
            references[own.part].update(own.table)
        for pool, counts in zip(self._pools, references, strict=True):
            pool.check(counts)
        for number, own in self._sequences.items():
            self._check(f"sequence {number}", own)
        counts = Counter(own.part for own in self._sequences.values())
        assert self._count == [counts[part] for part in range(len(self._pools))], "lost count"

    def _check(self, name: str, own: _Blocks) -> None:
        pool, full = self._pools[own.part], own.computed // self.block_size
        assert len(set(own.table)) == len(own.table), f"{name} has a block twice: {own.table}"
        assert own.computed <= len(own.table) * self.block_size, f"{name} lacks blocks"
        expected = full if self.prefix_caching else 0
        assert len(own.digests) == expected, f"{name} has {len(own.digests)} of {expected} digests"
        for block, digest in zip(own.table, own.digests, strict=False):
            assert pool.digest(block) in (None, digest), f"{name} has another's block {block}"
        for block in own.table[full:]:
            assert pool.references(block) == 1, f"{name} writes to block {block} of another"
            assert pool.digest(block) is None, f"{name} writes to block {block}, which is named"

    def _blocks(self, length: int) -> int:
        return ceil(length / self.block_size)

    def _left(self, part: int, cached: Sequence[int], new: int) -> int:
        """Free blocks of a part after a sequence has begun there; below 0 where it cannot."""
        pool = self._pools[part]
        return pool.free_blocks - pool.idle(cached) - new

    def _add(self, sequence: int, own: _Blocks) -> None:
        assert sequence not in self._sequences, f"sequence {sequence} has blocks"
        self._sequences[sequence] = own
        self._count[own.part] += 1

    def _find(
        self, tokens: Sequence[int], root: bytes, parts: Iterable[int], digests: list[bytes]
    ) -> dict[int, list[int]]:
        """The blocks of each part that hold a prefix of the tokens; adds what `digests` lacks."""
        found: dict[int, list[int]] = {part: [] for part in parts}
        going = list(found)
        for index in range((len(tokens) - 1) // self.block_size):
            if not going:
                break
            if index == len(digests):
                digests.append(self._digest(digests[-1] if index else root, tokens, index))
            blocks = {part: self._pools[part].find(digests[index]) for part in going}
            going = [part for part in going if blocks[part] is not None]
            for part in going:
                block = blocks[part]
                assert block is not None
                found[part].append(block)
        return found

    def _digest(self, before: bytes, tokens: Sequence[int], index: int) -> bytes:
        """Of a full block, from that of the block before it and its own tokens."""
        first = index * self.block_size
        return sha256(before + self._tokens.pack(*tokens[first : first + self.block_size])).digest()


def _root(salt: bytes) -> bytes:
    """What stands for the block before the first: of 32 bytes, so of fewer than any block's."""
    return sha256(sha256(salt).digest()).digest()
