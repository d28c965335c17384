# SPDX-License-Identifier: Apache-2.0
"""What each step computes, decided over KV blocks of 4 positions, for a model that says 7."""

import pytest

from meshwen.cache import block_manager
from meshwen.cache.block_manager import BlockManager
from meshwen.engine.scheduler import Scheduler
from meshwen.engine.sequence import SequenceState
from meshwen.engine.step_plan import StepPlan
from sequences import sequence

MANY = 1000  # blocks


class Scheduling:
    """A scheduler and its blocks; `usable` are those of each part that sequences may have."""

    def __init__(self, seqs=4, budget=16, usable=MANY, parts=1, caching=False):
        self.blocks = BlockManager(parts, usable + 1, 4, caching)
        self.scheduler = Scheduler(self.blocks, parts, seqs, budget)

    def add(self, *sequences: SequenceState) -> None:
        self.scheduler.add(sequences)

    def step(self) -> dict[int, tuple[int, int]]:
        """Does what is decided: by sequence, its first position in the step and its tokens."""
        plan = self.scheduler.schedule()
        self.blocks.check()
        for chunk in plan:
            if chunk.samples:
                give(chunk.sequence)
        self.scheduler.release_ended()
        self.blocks.check()
        return {chunk.sequence.number: (chunk.start, chunk.count) for chunk in plan}

    def steps(self, count: int) -> list[dict[int, tuple[int, int]]]:
        return [self.step() for _ in range(count)]

    @property
    def rows(self) -> list[tuple[int, int, int]]:
        """Part, row and number of all sequences that have rows."""
        return [(part, row, one.number) for part, row, one in self.scheduler.rows()]


def give(one: SequenceState) -> None:
    one.append(7, None)
    if len(one.tokens) == one.limit:
        one.finish_reason = "length"


def prompt(length: int, first: int = 0) -> range:
    return range(first, first + length)


def test_a_prompt_is_computed_then_a_token_each_step_until_the_answer_ends():
    one = Scheduling()
    one.add(sequence(0, prompt(5), limit=3))
    assert one.steps(4) == [{0: (0, 5)}, {0: (5, 1)}, {0: (6, 1)}, {}]
    assert one.rows == []
    assert one.blocks.used_blocks == 0


def test_decode_tokens_come_first_then_prompts_under_way_then_waiting_ones():
    one = Scheduling(budget=10)
    one.add(sequence(0, prompt(2)), sequence(1, prompt(12)), sequence(2, prompt(9)))
    one.add(sequence(3, prompt(3)))
    assert one.steps(4) == [
        {0: (0, 2), 1: (0, 8)},
        {0: (2, 1), 1: (8, 4), 2: (0, 5)},
        {0: (3, 1), 1: (12, 1), 2: (5, 4), 3: (0, 3)},
        {0: (4, 1), 1: (13, 1), 2: (9, 1), 3: (3, 1)},
    ]


def test_a_step_has_no_more_tokens_than_its_budget():
    one = Scheduling(seqs=4, budget=3)
    one.add(*(sequence(n, prompt(2), limit=5) for n in range(4)))
    assert [sum(count for _, count in step.values()) for step in one.steps(5)] == [3] * 5
    one.steps(10)
    assert one.rows == []


def test_a_request_gets_the_row_of_one_that_ended():
    one = Scheduling(seqs=2)
    one.add(sequence(0, limit=9), sequence(1, limit=2), sequence(2, limit=2))
    assert [list(step) for step in one.steps(4)] == [[0, 1], [0, 1], [0, 2], [0, 2]]


def test_none_overtakes_a_request_that_there_are_no_blocks_for():
    one = Scheduling(usable=6)
    one.add(sequence(0, prompt(8), limit=3), sequence(1, prompt(20)), sequence(2, prompt(1)))
    assert [list(step) for step in one.steps(4)] == [[0], [0], [0], [1]]


def test_a_request_that_waits_is_not_hashed_at_each_step(monkeypatch):
    one, hashed, sha256 = Scheduling(usable=5, caching=True), [], block_manager.sha256
    first, waiting = sequence(0, prompt(9), limit=9), sequence(1, prompt(16))
    one.add(first, waiting)
    one.step()
    monkeypatch.setattr(block_manager, "sha256", lambda d: (hashed.append(d), sha256(d))[1])
    one.step()
    assert (len(waiting.digests), waiting.computed) == (3, 0)
    del hashed[:]
    one.step()
    assert all(len(data) == 32 or not data for data in hashed)  # Its salt alone.
    while not first.ended:
        one.step()
    one.step()
    assert waiting.cached_tokens == 8


def test_a_request_waits_while_there_is_no_block_left_for_each_answer_to_go_on():
    one = Scheduling(usable=6)
    one.add(sequence(0, prompt(4)), sequence(1, prompt(4)), sequence(2, prompt(4)))
    assert list(one.step()) == [0, 1, 2]
    one = Scheduling(usable=5)
    one.add(sequence(0, prompt(4)), sequence(1, prompt(4)), sequence(2, prompt(4)))
    assert list(one.step()) == [0, 1, 2]
    one = Scheduling(usable=4)
    one.add(sequence(0, prompt(4)), sequence(1, prompt(4)), sequence(2, prompt(4)))
    assert list(one.step()) == [0, 1]


def test_the_newest_gives_its_blocks_back_and_resumes_with_its_answer_before_others():
    one = Scheduling(usable=4)
    old, new = sequence(0, prompt(5), limit=9), sequence(1, prompt(4), limit=9)
    one.add(old, new, sequence(2, prompt(1)))
    assert one.steps(4) == [
        {0: (0, 5), 1: (0, 4)},
        *({0: (n, 1), 1: (n - 1, 1)} for n in (5, 6, 7)),
    ]
    assert (one.scheduler.preemptions, new.tokens) == (0, [7] * 4)
    version = one.scheduler.batch_version
    # The first needs a third block, of which the last one has the two others.
    assert one.step() == {0: (8, 1)}
    assert one.scheduler.preemptions == 1
    assert one.scheduler.batch_version > version
    assert one.rows == [(0, 0, 0)]
    assert one.steps(4) == [{0: (n, 1)} for n in (9, 10, 11, 12)]
    assert old.ended
    assert one.step() == {1: (0, 8), 2: (0, 1)}
    assert new.tokens == [7] * 5


def test_of_several_that_give_their_blocks_back_the_older_resumes_first():
    one = Scheduling(usable=8, budget=100)
    one.add(*(sequence(n, prompt(7), limit=20) for n in range(3)))
    found = [list(step) for step in one.steps(21)]
    assert found == [[0, 1, 2]] * 2 + [[0, 1]] * 8 + [[0]] * 10 + [[1]]
    assert one.scheduler.preemptions == 2


def test_an_answer_alone_has_all_blocks():
    one = Scheduling(usable=3)
    last = sequence(0, prompt(5), limit=7)
    one.add(last, sequence(1, prompt(2)))
    assert one.steps(7) == [{0: (0, 5)}, *({0: (n, 1)} for n in range(5, 11))]
    assert last.ended


def test_a_prefix_that_is_cached_is_not_computed_again():
    one = Scheduling(budget=20, caching=True)
    first, second = sequence(0, prompt(11), limit=1), sequence(1, prompt(20), limit=1)
    one.add(first)
    one.step()
    one.add(second)
    assert one.step() == {1: (8, 12)}
    assert (first.cached_tokens, second.cached_tokens) == (0, 8)
    assert (one.blocks.stats.queried_tokens, one.blocks.stats.cached_tokens) == (31, 8)


def test_the_last_token_of_a_prompt_is_always_computed():
    one = Scheduling(caching=True)
    one.add(sequence(0, prompt(8), limit=1), sequence(1, prompt(8), limit=1))
    assert one.step() == {0: (0, 8), 1: (4, 4)}


def test_a_prefix_that_another_computes_in_the_same_step_counts_as_cached():
    one = Scheduling(budget=10, caching=True)
    one.add(sequence(0, prompt(9)), sequence(1, [*prompt(8), 50]))
    assert one.step() == {0: (0, 9), 1: (8, 1)}


def test_a_prompt_whose_logprobs_are_wanted_is_computed_whole_but_serves_others():
    one = Scheduling(budget=100, caching=True)
    one.add(sequence(0, prompt(9)), sequence(1, prompt(9), prompt_logprobs=True))
    one.add(sequence(2, prompt(9, 50), prompt_logprobs=True), sequence(3, prompt(9, 50)))
    assert one.step() == {0: (0, 9), 1: (0, 9), 2: (0, 9), 3: (8, 1)}


def test_a_resumed_sequence_finds_its_own_blocks_and_keeps_what_its_prompt_had_found():
    one = Scheduling(usable=5, caching=True)
    new = sequence(1, prompt(5, 50), limit=9)
    one.add(sequence(0, prompt(6), limit=5), new)
    assert [list(step) for step in one.steps(5)] == [[0, 1]] * 4 + [[0]]
    assert one.scheduler.preemptions == 1
    assert one.step() == {1: (8, 1)}
    assert new.cached_tokens == 0


def test_each_part_of_the_batch_has_its_share_of_rows_budget_and_blocks():
    one = Scheduling(seqs=4, budget=8, usable=4, parts=2)
    one.add(*(sequence(n, prompt(6), limit=2) for n in range(6)))
    assert one.step() == {0: (0, 4), 1: (0, 4)}
    assert one.rows == [(0, 0, 0), (1, 0, 1)]
    assert one.step() == {0: (4, 2), 1: (4, 2)}
    # A block stays free for the answer that each part has: no room for a second prompt.
    assert one.step() == {0: (6, 1), 1: (6, 1)}
    assert one.step() == {2: (0, 4), 3: (0, 4)}
    assert [(part, row) for part, row, _ in one.rows] == [(0, 0), (1, 0)]


def test_requests_go_to_the_part_that_has_their_prefix():
    one = Scheduling(seqs=4, budget=40, parts=2, caching=True)
    first, second = prompt(9), prompt(9, 50)
    one.add(sequence(0, first), sequence(1, second), sequence(2, second), sequence(3, first))
    one.step()
    assert one.rows == [(0, 0, 0), (0, 1, 3), (1, 0, 1), (1, 1, 2)]


def test_a_part_without_a_free_row_takes_no_request_though_it_has_its_prefix():
    one = Scheduling(seqs=4, budget=80, parts=2, caching=True)
    one.add(*(sequence(n, prompt(9)) for n in range(5)))
    one.step()
    assert one.rows == [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)]


def test_a_part_keeps_a_block_free_for_each_of_its_own_answers_alone():
    one = Scheduling(seqs=6, budget=100, usable=4, parts=2)
    for number in range(3):
        one.add(sequence(number, prompt(4, 10 * number), limit=9))
    assert one.step().keys() == {0, 1, 2}
    assert one.rows == [(0, 0, 0), (0, 1, 2), (1, 0, 1)]
    # The answers take a second block each, which leaves the second part two: one is for its answer.
    one.add(sequence(3, prompt(4, 40), limit=9))
    assert 3 in one.step()
    assert (1, 1, 3) in one.rows


def test_there_are_as_many_rows_as_parts_at_least():
    one = Scheduling(seqs=1, parts=4)
    one.add(*(sequence(n, [n]) for n in range(5)))
    assert list(one.step()) == [0, 1, 2, 3]


def test_one_part_gives_way_while_another_goes_on():
    one = Scheduling(seqs=4, budget=100, usable=6, parts=2)
    one.add(sequence(0, prompt(6), limit=18), *(sequence(n, prompt(2)) for n in (1, 2, 3)))
    while not one.scheduler.preemptions:
        assert one.rows in ([], [(0, 0, 0), (0, 1, 3), (1, 0, 1), (1, 1, 2)])
        found = one.step()
    assert sorted(found) == [0, 1, 2]


def answers(count: int, tokens, **options) -> SequenceState:
    """The first of several answers to a prompt."""
    first, *others = (sequence(n, tokens, **options) for n in range(count))
    first.siblings = others
    return first


def test_the_other_answers_to_a_prompt_begin_with_its_last_token_and_copy_its_last_block():
    one = Scheduling(budget=8)
    one.add(answers(3, prompt(10), limit=3))
    assert one.step() == {0: (0, 8)}
    plan = one.scheduler.schedule()
    one.blocks.check()
    assert [(c.row, c.start, c.count, c.after) for c in plan] == [
        (0, 8, 2, None),
        (1, 10, 0, 0),
        (2, 10, 0, 0),
    ]
    assert all(chunk.samples for chunk in plan)
    tables = [one.blocks.table(n) for n in range(3)]
    assert [table[:2] for table in tables] == [tables[0][:2]] * 3
    assert plan.copies == [[(tables[0][2], table[2]) for table in tables[1:]]]
    for chunk in plan:
        give(chunk.sequence)
    assert one.step() == dict.fromkeys(range(3), (10, 1))


def test_answers_without_a_row_wait_before_others_and_find_their_prompt():
    one = Scheduling(seqs=2, caching=True)
    one.add(answers(4, prompt(10), limit=2), sequence(9, prompt(3), limit=2))
    assert one.step() == {0: (0, 10), 1: (10, 0)}
    assert one.step() == {0: (10, 1), 1: (10, 1)}
    assert one.step() == {2: (8, 2), 3: (8, 2)}
    assert list(one.steps(2)[1]) == [9]


def test_answers_without_blocks_wait():
    one = Scheduling(usable=4)
    one.add(answers(3, prompt(10), limit=2))
    assert list(one.step()) == [0, 1]
    assert list(one.steps(2)[1]) == [2]


def test_answers_share_full_blocks_without_a_copy():
    one = Scheduling()
    one.add(answers(2, prompt(8)))
    plan = one.scheduler.schedule()
    assert plan.copies == [[]]
    assert one.blocks.used_blocks == 2


def test_a_step_in_which_answers_begin_as_copies_prefills_whatever_is_computed():
    one = Scheduling()
    one.add(answers(2, prompt(1)))
    assert one.scheduler.schedule().prefills


def test_cancelled_requests_leave_the_queue_and_their_rows_and_blocks():
    one = Scheduling(seqs=2, budget=8)
    gone = [sequence(0, prompt(20)), sequence(1)]
    one.add(*gone, sequence(2))
    assert one.step() == {0: (0, 8)}
    for each in gone:
        each.cancelled = True
    one.scheduler.drop_cancelled()
    assert one.blocks.used_blocks == 0
    assert one.step() == {2: (0, 3)}
    assert one.rows == [(0, 0, 2)]


def test_a_sequence_that_is_cancelled_while_others_are_released_keeps_no_blocks():
    class Sudden(SequenceState):
        """Cancelled by another thread right after it was looked at."""

        @property
        def ended(self):
            before, self.cancelled = self.cancelled, True
            return before

    one, plain = Scheduling(), sequence(0)
    sudden = Sudden(1, plain.request, 10, frozenset(), plain.on_event, plain.text)
    one.add(plain, sudden)
    one.scheduler.schedule()
    plain.cancelled = True
    one.scheduler.release_ended()
    one.scheduler.release_ended()
    assert one.rows == []
    assert one.blocks.used_blocks == 0


def test_progress_is_that_of_the_prompt_that_has_been_computed_longest():
    one = Scheduling(budget=8)
    assert one.scheduler.prefilled is None
    one.add(sequence(0, prompt(18)), sequence(1, prompt(12)))
    found = []
    for _ in range(5):
        one.step()
        found.append(one.scheduler.prefilled)
    assert found == [(8, 18), (16, 18), (6, 12), None, None]


def test_a_prompt_of_which_only_the_last_token_is_left_is_not_done():
    one = Scheduling(budget=8)
    one.add(sequence(0, prompt(9)))
    one.step()
    assert one.scheduler.prefilled == (8, 9)


def test_an_answer_that_is_computed_again_counts_as_a_prompt():
    one = Scheduling(budget=8)
    one.add(sequence(0, prompt(10), tokens=[7] * 10))
    one.step()
    assert one.scheduler.prefilled == (8, 20)


def test_the_batch_is_another_when_and_only_when_a_row_is():
    one, first = Scheduling(seqs=2, budget=8), sequence(0, limit=50)

    def changed() -> bool:
        nonlocal before
        before, last = one.scheduler.batch_version, before
        return before != last

    before = one.scheduler.batch_version
    one.add(first)
    assert not changed()
    one.step()
    assert changed()
    one.step()
    assert not changed()
    one.add(sequence(1, prompt(12)))
    one.step()
    assert changed()
    one.step()  # The rest of the prompt.
    assert not changed()
    one.add(sequence(2))
    one.step()  # There is no row for it.
    assert not changed()
    first.cancelled = True
    one.scheduler.release_ended()
    assert changed()
    one.scheduler.release_ended()
    assert not changed()


def test_a_cleared_scheduler_has_forgotten_everything():
    one = Scheduling(seqs=1)
    one.add(sequence(0, prompt(20)), sequence(1))
    one.step()
    version = one.scheduler.batch_version
    one.scheduler.clear()
    assert one.blocks.used_blocks == 0
    assert one.scheduler.prefilled is None
    assert one.scheduler.batch_version > version
    assert one.step() == {}


@pytest.mark.parametrize(
    ("length", "budget", "prefills"),
    [
        (1, 16, [False]),
        (2, 16, [True, False]),
        (17, 16, [True, False]),
        (3, 1, [True, True, False]),
    ],
)
def test_a_step_with_tokens_before_a_newest_one_prefills(length, budget, prefills):
    one = Scheduling(budget=budget)
    one.add(sequence(0, prompt(length)))
    plans: list[StepPlan] = []
    for _ in prefills:
        plans.append(one.scheduler.schedule())
        for chunk in plans[-1]:
            if chunk.samples:
                give(chunk.sequence)
    assert [plan.prefills for plan in plans] == prefills
