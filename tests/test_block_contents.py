# SPDX-License-Identifier: Apache-2.0
"""Whatever sequences do, each finds in its blocks what it computed, and nothing that another did.

Blocks are lists here. What a model would write at a position depends on all tokens up to it, so
that is what is written; drafts write what must never be found.
"""

import random
import sys
from collections import Counter
from collections.abc import Callable

import pytest

from meshwen.cache import block_manager
from meshwen.cache.block_manager import BlockManager

SIZE, PARTS = 3, 2


class Sequences:
    """Sequences that begin, are computed, fork and end, over blocks that remember every write.

    What happens is drawn; `seen` counts what has happened.
    """

    def __init__(self, seed: int, num_blocks: int, prefix_caching: bool = True):
        self.draw, self.seen = random.Random(seed), Counter()
        self.num_blocks, self.prefix_caching = num_blocks, prefix_caching
        self.blocks = BlockManager(PARTS, num_blocks, SIZE, prefix_caching)
        self.common = [self.draw.randrange(2) for _ in range(3 * SIZE)]
        self.number = 0
        self.forget()

    def forget(self):
        self.written = [[[None] * SIZE for _ in range(self.num_blocks)] for _ in range(PARTS)]
        self.tokens: dict[int, list[int]] = {}
        self.salt: dict[int, bytes] = {}
        self.done: dict[int, int] = {}  # Tokens computed.
        self.ever = [set() for _ in range(PARTS)]  # Prefixes of full blocks that were computed.
        self.evictions = self.blocks.stats.evictions

    def run(self, steps: int):
        """Draws what happens next so many times, and checks everything after each."""
        weights = {
            self.begins: 6,
            self.is_computed: 12,
            self.goes_on: 3,
            self.drafts: 3,
            self.forks: 2,
            self.ends: 4,
            self.is_preempted_and_begins_again: 1,
            self.is_peeked_at: 1,
            self.is_cleared: 0.05,
        }
        for _ in range(steps):
            (happens,) = self.draw.choices([*weights], [*weights.values()])
            happens(*([self.draw.choice([*self.tokens])] if self.tokens else [None]))
            self.check()

    def check(self):
        self.blocks.check()
        for sequence, done in self.done.items():
            for position in range(done):
                block, at = self.slot(sequence, position)
                assert block[at] == self.content(sequence, position)
        free = [self.free_blocks(part) for part in range(PARTS)]
        assert [self.blocks.free_blocks(part) for part in range(PARTS)] == free
        assert self.blocks.used_blocks == PARTS * (self.num_blocks - 1) - sum(free)

    def slot(self, sequence, position) -> tuple[list, int]:
        """Where a sequence has a position: a block's content, and the place in it."""
        block = self.blocks.table(sequence)[position // SIZE]
        return self.written[self.blocks.part(sequence)][block], position % SIZE

    def content(self, sequence, position):
        return self.salt[sequence], *self.tokens[sequence][: position + 1]

    def write(self, sequence, start, stop):
        for position in range(start, stop):
            block, at = self.slot(sequence, position)
            block[at] = self.content(sequence, position)

    def some_tokens(self) -> list[int]:
        """Often with a common beginning."""
        common = self.common[: self.draw.randint(0, len(self.common))]
        return common + [self.draw.randrange(2) for _ in range(self.draw.randint(1, SIZE + 1))]

    def some_salt(self) -> bytes:
        return self.draw.choice([b"", b"x"])

    def new(self) -> int:
        self.number += 1
        return self.number

    def free_blocks(self, part) -> int:
        """By what the tables hold."""
        own = [self.blocks.table(n) for n in self.tokens if self.blocks.part(n) == part]
        return self.num_blocks - 1 - len({block for table in own for block in table})

    def state(self):
        tables = {n: [*self.blocks.table(n)] for n in self.tokens}
        return tables, [self.blocks.free_blocks(part) for part in range(PARTS)], self.blocks.stats

    def cached(self, tokens, salt, part) -> int:
        """What a part would find of a prompt if it had never evicted anything."""
        found = 0
        while (salt, *tokens[: found + SIZE]) in self.ever[part] and found + SIZE < len(tokens):
            found += SIZE
        return found if self.prefix_caching else 0

    def begin(self, sequence, tokens, salt, use_cached, parts):
        before, free = self.state(), {part: self.free_blocks(part) for part in parts}
        count = Counter(self.blocks.part(number) for number in self.tokens)
        blocks = -(-len(tokens) // SIZE)
        placement = self.blocks.begin(sequence, tokens, salt, use_cached, parts)
        if placement is None:
            self.seen["no room"] += 1
            assert all(free[p] - blocks < parts[p] for p in parts)
            assert self.state() == before
            return
        part, cached = placement
        assert part in parts
        assert part == self.blocks.part(sequence)
        self.tokens[sequence], self.salt[sequence] = [*tokens], salt
        self.done[sequence] = cached
        assert len(self.blocks.table(sequence)) == blocks
        assert self.free_blocks(part) >= parts[part]
        found = {p: self.cached(tokens, salt, p) if use_cached else 0 for p in parts}
        assert cached <= found[part]
        if self.blocks.stats.evictions == self.evictions:
            self.seen["found"] += cached > 0
            assert cached == found[part]
            if all(free[p] - blocks >= parts[p] for p in parts):  # Any part would do.
                costs = {p: count[p] - found[p] // SIZE for p in parts}
                assert costs[part] == min(costs.values())
        else:
            self.seen["found after evictions"] += cached > 0

    def begins(self, _):
        use_cached = self.draw.random() < 0.9
        among = self.draw.choice([[0, 1], [0], [1]])
        parts = {part: self.draw.choice([0, 0, 1, 3]) for part in among}
        self.begin(self.new(), self.some_tokens(), self.some_salt(), use_cached, parts)

    def is_computed(self, sequence):
        if sequence is None:
            return
        tokens, done = self.tokens[sequence], self.done[sequence]
        count = self.draw.choice([len(tokens), self.draw.randint(done, len(tokens))])
        late = self.draw.random() < 0.5
        if not late:
            self.write(sequence, done, count)
        self.blocks.computed(sequence, tokens, count)
        if late:  # In the step that was being scheduled.
            self.write(sequence, done, count)
        self.done[sequence] = count
        full = {(self.salt[sequence], *tokens[:n]) for n in range(SIZE, count + 1, SIZE)}
        self.ever[self.blocks.part(sequence)] |= full

    def goes_on(self, sequence):
        if sequence is None:
            return
        more, before = self.some_tokens(), self.state()
        length = len(self.tokens[sequence]) + len(more)
        missing = -(-length // SIZE) - len(self.blocks.table(sequence))
        enough = missing <= self.free_blocks(self.blocks.part(sequence))
        self.seen["goes on", enough] += 1
        assert self.blocks.extend(sequence, length) == enough
        if enough:
            self.tokens[sequence] += more
        else:
            assert self.state() == before

    def drafts(self, sequence):
        if sequence is None:
            return
        for position in range(self.done[sequence], len(self.blocks.table(sequence)) * SIZE):
            block, at = self.slot(sequence, position)
            block[at] = "a draft"

    def forks(self, parent):
        if parent is None:
            return
        child, done = self.new(), self.done[parent]
        length = self.draw.choice([done, self.draw.randint(0, done)])
        before, part = self.state(), self.blocks.part(parent)
        own = int(length % SIZE > 0)
        enough = own <= self.free_blocks(part)
        copies = self.blocks.fork(parent, child, length)
        self.seen["forks", enough, own] += 1
        if not enough:
            assert copies is None
            assert self.state() == before
            return
        assert len(copies) == own
        for source, destination in copies:
            self.written[part][destination] = [*self.written[part][source]]
        self.tokens[child] = self.tokens[parent][:length]
        self.salt[child], self.done[child] = self.salt[parent], length

    def ends(self, sequence):
        if sequence is not None:
            self.blocks.free(sequence)
            del self.tokens[sequence], self.salt[sequence], self.done[sequence]

    def is_preempted_and_begins_again(self, sequence):
        if sequence is None:
            return
        tokens, salt = self.tokens[sequence], self.salt[sequence]
        self.ends(sequence)
        if tokens:
            self.begin(sequence, tokens, salt, True, dict.fromkeys(range(PARTS), 0))

    def is_cleared(self, _):
        self.seen["cleared"] += 1
        self.blocks.clear()
        self.forget()

    def is_peeked_at(self, _):
        tokens, salt, before = self.some_tokens(), self.some_salt(), self.state()
        part, found = self.blocks.find(tokens, salt)
        assert self.state() == before
        assert len(found) * SIZE <= self.cached([*tokens, 0], salt, part)
        for index, block in enumerate(found):
            content = [(salt, *tokens[: index * SIZE + n + 1]) for n in range(SIZE)]
            assert self.written[part][block] == content
        self.seen["peeked"] += len(found) > 0


@pytest.mark.parametrize("seed", range(8))
def test_every_sequence_finds_what_it_computed_whatever_others_do(seed):
    few, enough = Sequences(seed, num_blocks=9), Sequences(seed, num_blocks=1500)
    few.run(1000)
    enough.run(200)
    assert few.blocks.stats.evictions > 20
    assert enough.blocks.stats.evictions == 0
    assert enough.seen["found"] > 10
    forks = [("forks", True, 0), ("forks", True, 1), ("forks", False, 1)]
    events = "no room", "found after evictions", "peeked", ("goes on", False), *forks
    assert min(few.seen[event] for event in events) >= 3, few.seen


def test_without_prefix_caching_every_sequence_finds_what_it_computed():
    sequences = Sequences(0, num_blocks=9, prefix_caching=False)
    sequences.run(1000)
    assert sequences.seen["forks", True, 1] >= 3, sequences.seen
    assert sequences.blocks.stats.evictions == 0


def lines(call: Callable[[], object]) -> int:
    """Lines of the package that a call executes, those of its loops each time."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if "meshwen" not in frame.f_code.co_filename:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def test_a_step_costs_the_same_at_every_length():
    blocks, tokens, costs = BlockManager(1, 1000, 16, True), [], []
    blocks.begin(0, [0], b"")
    for token in range(10_000):
        tokens.append(token)

        def step():
            assert blocks.extend(0, len(tokens))
            blocks.computed(0, tokens, len(tokens))

        costs.append(lines(step))
    assert costs[32:64] * (9_984 // 32 - 1) == costs[32 : len(costs) // 32 * 32]


class Counted(list):
    """Counts the items that are taken."""

    taken = 0

    def __getitem__(self, index):
        found = super().__getitem__(index)
        self.taken += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self):
        self.taken += len(self)
        return super().__iter__()


def test_every_token_is_hashed_once(monkeypatch):
    hashed = []
    sha256 = block_manager.sha256
    monkeypatch.setattr(
        block_manager, "sha256", lambda data: (hashed.append(data), sha256(data))[1]
    )
    blocks, tokens = BlockManager(1, 700, 16, True), Counted(range(10_000))
    blocks.begin(0, tokens, b"")
    begun, tokens.taken = len(hashed), 0
    for count in (*range(1, 10_000, 7), 10_000):
        blocks.computed(0, tokens, count)
    assert tokens.taken == 10_000
    assert len(hashed) - begun == 10_000 // 16


def costs_in_a_pool_of(num_blocks: int) -> list[int]:
    """Lines that operations execute where each block is evictable."""
    blocks = BlockManager(1, num_blocks + 1, 4, True)
    for number in range(num_blocks):
        blocks.begin(number, [number] * 4, b"")
        blocks.computed(number, [number] * 4, 4)
    for number in range(num_blocks):
        blocks.free(number)
    costs = [
        lines(lambda: blocks.begin(-1, [-1] * 4, b"")),
        lines(lambda: blocks.begin(-2, [9] * 5, b"")),
        lines(lambda: blocks.extend(-2, 9)),
        lines(lambda: blocks.free(-2)),
    ]
    assert blocks.stats.evictions == 3
    return costs


def test_pools_of_any_size_give_evict_and_find_at_the_same_cost():
    assert costs_in_a_pool_of(20) == costs_in_a_pool_of(2000)
