# SPDX-License-Identifier: Apache-2.0
"""For which shapes steps are compiled, where their tokens are, and their rows' block tables."""

import numpy as np
import pytest

from meshwen.engine.step_plan import Chunk, InputArrays, StepPlan
from sequences import sequence


def chunk(row: int, length: int, start: int, count: int, drafts=(), after=None) -> Chunk:
    """Of a sequence of `length` tokens, numbered as its row."""
    return Chunk(sequence(row, range(length)), row, start, count, drafts, after)


def newest(row: int, length: int = 5, drafts=()) -> Chunk:
    return chunk(row, length, length - 1, 1, drafts)


def plan(*parts, rows=None, most_rows=16, prefills=False) -> StepPlan:
    rows = rows or max(map(len, parts))
    return StepPlan([list(part) for part in parts], rows, most_rows, prefills)


@pytest.mark.parametrize(
    ("rows", "most_rows", "decoding", "prefilling"),
    [
        *[(1, 16, 1, 8), (3, 16, 4, 8), (9, 16, 16, 16), (9, 12, 12, 12), (1, 5, 1, 5)],
        *[(4, 5, 4, 5), (8, 99, 8, 8), (9, 99, 16, 64), (64, 99, 64, 64), (65, 99, 99, 99)],
    ],
)
def test_a_step_is_for_a_power_of_two_of_sequences_and_with_prompts_of_eight(
    rows, most_rows, decoding, prefilling
):
    one = [newest(0)]
    assert plan(one, rows=rows, most_rows=most_rows).row_bucket == decoding
    assert plan(one, rows=rows, most_rows=most_rows, prefills=True).row_bucket == prefilling


def test_a_step_of_newest_tokens_is_for_a_token_of_each_row():
    assert plan([newest(0), newest(4)], rows=5).token_bucket == 8
    assert plan([newest(0)], [], rows=12, most_rows=12).token_bucket == 12


@pytest.mark.parametrize(
    ("counts", "expected"), [([2], 8), ([5, 4], 16), ([16, 1], 24), ([30, 2], 32), ([33], 48)]
)
def test_a_step_with_prompts_is_for_a_bucket_of_the_tokens_of_the_longest_part(counts, expected):
    chunks = [chunk(row, 100, 0, count) for row, count in enumerate(counts)]
    assert plan([newest(0)], chunks, prefills=True).token_bucket == expected


def test_drafts_count_as_tokens():
    step = plan([newest(0, drafts=[7, 8, 9]), newest(1)], most_rows=2)
    assert (step.drafts, step.token_bucket, step.row_bucket) == (True, 8, 2)
    assert not plan([newest(0)]).drafts


def test_tokens_stand_one_behind_the_other_in_each_part():
    first = [newest(0, drafts=[7, 8]), newest(2)]
    second = [newest(1, drafts=[9])]
    places = [(c, (place.start, place.stop)) for c, place in plan(first, second).places()]
    assert places == [(first[0], (0, 3)), (first[1], (3, 4)), (second[0], (4, 6))]


def test_samples_are_by_row_and_with_drafts_by_token():
    first, second = [newest(0), chunk(1, 9, 2, 3)], [newest(0), newest(2)]
    step = plan(first, second, rows=3)
    assert step.samples
    assert list(step.sampled()) == [
        (0, first[0], range(0, 1)),
        (4, second[0], range(4, 5)),
        (6, second[1], range(6, 7)),
    ]
    second[1].drafts = [7, 8]
    first.pop()
    step = plan(first, second, rows=3)
    assert list(step.sampled()) == [
        (0, first[0], range(0, 1)),
        (4, second[0], range(4, 5)),
        (6, second[1], range(5, 8)),
    ]


def test_only_the_last_token_of_a_sequence_is_followed():
    assert not plan([chunk(0, 9, 0, 8)]).samples
    assert plan([chunk(0, 9, 0, 9)]).samples
    assert plan([chunk(0, 9, 9, 0, after=1)]).samples  # As a copy of another.


@pytest.mark.parametrize(
    ("start", "count", "scored"), [(0, 3, True), (3, 1, True), (4, 1, False), (3, 2, True)]
)
def test_tokens_before_the_last_of_a_prompt_are_scored_where_that_is_wanted(start, count, scored):
    one = sequence(0, range(5), prompt_logprobs=True)
    assert Chunk(one, 0, start, count).scored == scored
    one.prompt_logprobs.push(0, np.zeros(4))
    assert not Chunk(one, 0, start, count).scored
    assert not Chunk(sequence(0, range(5)), 0, start, count).scored


class Tables:
    """Block tables by number, and the arrays that are made of them."""

    def __init__(self):
        self.of = {0: [3, 4], 1: [5], 2: [6, 7, 8]}
        self.arrays = InputArrays(self.of.__getitem__, lambda needed: min(needed + needed % 2, 5))

    def made(self, version: int, *parts, rows=2) -> list[list[int]]:
        step = plan(*([newest(n) for n in part] for part in parts), rows=rows, most_rows=2)
        self.last = self.arrays.inputs(step, version).tables
        return self.last.tolist()


def test_tables_are_as_wide_as_the_longest_needs_and_zero_behind():
    tables = Tables()
    assert tables.made(1, [0, 1]) == [[3, 4], [5, 0]]
    assert tables.made(2, [0], [1]) == [[3, 4], [0, 0], [0, 0], [5, 0]]


def test_tables_are_kept_and_grow_while_rows_stay():
    tables = Tables()
    tables.made(1, [0, 1])
    before = tables.last
    tables.of[1].append(9)
    assert tables.made(1, [0, 1]) == [[3, 4], [5, 9]]
    assert tables.last is before
    tables.of[1].append(2)
    assert tables.made(1, [0, 1]) == [[3, 4, 0, 0], [5, 9, 2, 0]]


def test_tables_are_made_anew_when_rows_change():
    tables = Tables()
    tables.made(1, [0, 1])
    tables.of[1] = [8]  # Another sequence in the same row.
    assert tables.made(2, [0, 1]) == [[3, 4], [8, 0]]


def test_a_row_that_is_not_in_a_step_has_its_table_when_it_is():
    tables = Tables()
    assert tables.made(1, [0]) == [[3, 4], [0, 0]]
    assert tables.made(1, [0, 1]) == [[3, 4], [5, 0]]
    assert tables.made(1, [1]) == [[3, 4], [5, 0]]


def test_inputs_are_the_tokens_of_chunks_with_their_drafts():
    tables = Tables()
    step = plan([newest(0, drafts=[7, 8]), newest(1, length=3)], most_rows=2)
    found = tables.arrays.inputs(step, 1)
    assert found.token_ids.tolist() == [4, 7, 8, 2]
    assert found.positions.tolist() == [4, 5, 6, 2]
    assert found.query_starts.tolist() == [0, 3, 4]
    assert found.lengths.tolist() == [7, 3]
    assert found.asked.tolist() == [0, 1, 2, 3]
    assert found.sampler_rows.tolist() == [0, 0, 0, 1]
