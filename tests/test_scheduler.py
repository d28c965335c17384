# SPDX-License-Identifier: Apache-2.0
"""What runs next, decided over a cache of numbers and a model that says 7."""

from dataclasses import dataclass, field

import pytest

from meshwen.cache.budget import CacheBudget
from meshwen.engine.limits import SequenceLimits
from meshwen.engine.scheduler import Scheduler
from meshwen.engine.sequence import SequenceState
from sequences import sequence

HEADS = 1


@dataclass
class Cache:
    """Room for a batch of sequences of `length` positions, which may become `longest`."""

    batch_size: int = 2
    length: int = 1000
    longest: int = 1000
    parts: int = 1
    row_of: dict[int, int] = field(default_factory=dict)
    freed: list[tuple[int, bool]] = field(default_factory=list)
    asked: list[tuple[int, int]] = field(default_factory=list)

    def make_room(self, waiting, positions):
        self.asked.append((waiting, positions))
        return False

    def allocate(self, number, positions, part):
        first = part * (self.batch_size // self.parts)
        rows = range(first, first + self.batch_size // self.parts)
        free = [row for row in rows if row not in self.row_of.values()]
        if not free or positions > self.length:
            return False
        self.row_of[number] = free[0]
        return True

    def has_position(self, position):
        return position < self.length

    def extend(self, positions):
        old, self.length = self.length, min(self.longest, positions)
        return self.length > old

    def row(self, number):
        return self.row_of[number]

    def free(self, number, *, zero):
        del self.row_of[number]
        self.freed.append((number, zero))


def scheduler(cache: Cache) -> Scheduler:
    budget = CacheBudget(8, 10**4, cache.parts, 1, 10**6)
    return Scheduler(cache, SequenceLimits(budget, HEADS), cache.parts)


def step(plan: Scheduler) -> tuple[list[int], list[int]]:
    """Does what is decided; the requests prefilled in this step, and those decoded, by row."""
    prefilled, decoded = [], []
    if (prefill := plan.next_chunk()) is not None:
        prefilled = [one.number for one in prefill.sequences.values()]
        if plan.chunk_done():
            give(prefill.sequences.values())
            plan.release_ended()
    if running := plan.next_decode():
        assert list(running) == sorted(running)
        decoded = [one.number for one in running.values()]
        give(running.values())
        plan.release_ended()
    return prefilled, decoded


def give(sequences) -> None:
    for one in sequences:
        one.append(7, None)
        if len(one.tokens) == one.limit:
            one.finish_reason = "length"


def steps(plan: Scheduler, count: int) -> list[tuple[list[int], list[int]]]:
    return [step(plan) for _ in range(count)]


def long(number: int, chunks: int, **options) -> SequenceState:
    return sequence(number, [1] * (512 * chunks), **options)


def test_a_request_is_prefilled_then_decoded_until_it_ends():
    cache = Cache(batch_size=1)
    plan = scheduler(cache)
    plan.add([sequence(limit=3)])
    assert steps(plan, 3) == [([0], [0]), ([], [0]), ([], [])]
    assert cache.freed == [(0, False)]


def test_a_request_gets_the_row_of_one_that_ended_while_the_other_goes_on():
    plan = scheduler(Cache())
    plan.add([sequence(0, limit=9), sequence(1, limit=2), sequence(2, limit=3)])
    assert steps(plan, 4) == [([0], [0]), ([1], [0, 1]), ([2], [0, 2]), ([], [0, 2])]


def test_few_answers_wait_for_some_prompts_but_not_for_all():
    plan = scheduler(Cache(batch_size=32))
    plan.add([sequence(n, limit=50) for n in range(20)])
    decoded = [bool(answers) for _, answers in steps(plan, 20)]
    # Of 32 rows 16 make half.
    assert decoded == [False] * 7 + [True] + [False] * 7 + [True] * 5


def test_answers_go_on_between_the_chunks_of_a_long_prompt():
    plan = scheduler(Cache(length=5000))
    plan.add([sequence(0)])
    step(plan)
    plan.add([long(1, chunks=3)])
    assert steps(plan, 3) == [([1], [0]), ([1], [0]), ([1], [0, 1])]


def test_each_part_of_the_batch_prefills_one_prompt_at_a_time():
    plan = scheduler(Cache(batch_size=4, parts=2))
    plan.add([sequence(n) for n in range(4)])
    assert [prefilled for prefilled, _ in steps(plan, 3)] == [[0, 1], [2, 3], []]
    assert step(plan)[1] == [0, 2, 1, 3]  # By row: those of the first part, then of the second.


def test_none_overtakes_a_request_that_the_cache_has_no_room_for():
    plan = scheduler(Cache(length=32))
    plan.add([sequence(0, limit=3), sequence(1, [1] * 40), sequence(2)])
    assert [prefilled for prefilled, _ in steps(plan, 4)] == [[0], [], [], []]


def test_the_cache_is_asked_for_what_the_next_needs_and_when_empty_for_the_most():
    cache = Cache(batch_size=1)
    plan = scheduler(cache)
    plan.add([sequence(0, limit=100), sequence(1, [1] * 40, limit=400)])
    steps(plan, 2)
    # A prompt of 40 needs a chunk of 48; of an answer 256 tokens are provided for.
    assert cache.asked == [(2, 40 + 256), (1, 40 + 256)]
    plan.add([sequence(2)])
    step(plan)
    assert cache.asked[-1] == (2, 40 + 256)


def test_a_prompt_is_written_in_whole_chunks_which_need_room():
    cache = Cache(batch_size=1)
    plan = scheduler(cache)
    plan.add([sequence(0, [1] * 33, limit=2)])
    plan.next_chunk()
    assert cache.asked == [(1, 48)]


def test_an_answer_that_reaches_the_end_of_its_row_goes_on_where_the_cache_is_extended():
    cache = Cache(batch_size=1, length=1000, longest=2000)
    plan, one = scheduler(cache), sequence(0, [1] * 740, limit=300)
    plan.add([one])
    for _ in range(301):
        step(plan)
    assert (len(one.tokens), cache.length) == (300, 1040)
    assert cache.freed == [(0, False)]


def test_answers_without_room_wait_and_are_prefilled_again_before_others():
    cache = Cache(batch_size=2, length=300, longest=300)
    plan = scheduler(cache)
    first, second = (sequence(n, [1] * 40, limit=m) for n, m in ((0, 300), (1, 100)))
    plan.add([first, second])
    while first.length <= 300:  # The newest token would be written behind the last position.
        assert step(plan)[1]
    plan.add([sequence(2)])
    assert step(plan) == ([2], [2])
    assert cache.freed == [(1, False), (0, False)]
    cache.length = 400
    assert step(plan) == ([0], [0, 2])
    assert first.length == 303


def test_cancelled_requests_leave_the_queue_the_prefill_and_their_rows():
    cache = Cache(batch_size=2, length=5000)
    plan = scheduler(cache)
    gone = [long(0, chunks=3), sequence(1)]
    plan.add([*gone, sequence(2)])
    assert plan.next_chunk().sequences == {0: gone[0]}
    assert not plan.chunk_done()
    assert plan.prefill.progress == (512, 3 * 512)
    for one in gone:
        one.cancelled = True
    plan.drop_cancelled()
    assert plan.prefill is None
    assert cache.freed == [(0, True)]
    assert step(plan) == ([2], [2])


def test_of_prompts_that_are_prefilled_together_one_may_be_cancelled():
    plan = scheduler(Cache(batch_size=2, length=5000, parts=2))
    both = [long(0, chunks=2), long(1, chunks=3)]
    plan.add(both)
    plan.next_chunk()
    plan.chunk_done()
    both[0].cancelled = True
    plan.drop_cancelled()
    assert plan.prefill.sequences == {1: both[1]}
    assert plan.prefill.lengths(2).tolist() == [0, 3 * 512]
    assert [step(plan)[0] for _ in range(2)] == [[1], [1]]
    assert both[1].tokens


@pytest.mark.parametrize(
    ("reason", "cancelled", "zero"),
    [("stop", False, False), ("length", False, False), ("error", False, True), (None, True, True)],
)
def test_a_row_that_may_hold_nan_is_cleared(reason, cancelled, zero):
    cache = Cache()
    plan = scheduler(cache)
    one = sequence()
    plan.add([one])
    step(plan)
    one.finish_reason, one.cancelled = reason, cancelled
    plan.release_ended()
    assert cache.freed == [(0, zero)]


def test_the_batch_is_another_when_and_only_when_something_else_runs_or_moves(monkeypatch):
    cache = Cache(batch_size=2, length=5000)
    plan = scheduler(cache)
    first = sequence(limit=50)

    def changed() -> bool:
        nonlocal before
        before, last = plan.batch_version, before
        return before != last

    before = plan.batch_version
    plan.add([first])
    step(plan)
    assert changed()
    step(plan)
    assert not changed()
    plan.add([long(1, chunks=2)])
    step(plan)
    assert not changed()  # It is being prefilled.
    step(plan)
    assert changed()
    plan.add([sequence(2)])
    monkeypatch.setattr(cache, "make_room", lambda *_: True)
    step(plan)
    assert changed()
    monkeypatch.undo()
    first.cancelled = True
    plan.release_ended()
    assert changed()


def test_a_cleared_scheduler_has_forgotten_everything():
    plan = scheduler(Cache())
    plan.add([long(0, chunks=1), sequence(1)])
    plan.next_chunk()
    plan.clear()
    assert plan.prefill is None
    assert step(plan) == ([], [])


def test_prefill_inputs_are_the_tokens_of_each_part_and_what_the_chunk_attends_to():
    plan = scheduler(Cache(batch_size=2, length=5000, parts=2))
    plan.add([sequence(0, range(700)), sequence(1, [5] * 20, tokens=[6])])
    first = plan.next_chunk().inputs([0, 3])
    assert (first.start, first.positions, first.rows.tolist()) == (0, 512, [0, 3])
    assert first.lengths.tolist() == [700, 21]
    assert first.token_ids[0].tolist() == list(range(512))
    assert first.token_ids[1].tolist() == [5] * 20 + [6] + [0] * 491
    plan.chunk_done()
    second = plan.next_chunk().inputs([0, 3])
    assert (second.start, second.positions) == (512, 768)
    assert second.token_ids[0].tolist() == [*range(512, 700), *[0] * 4]
    assert not second.token_ids[1].any()
