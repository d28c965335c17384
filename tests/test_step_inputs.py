# SPDX-License-Identifier: Apache-2.0
"""The arrays of a step: each part's own, padded."""

import numpy as np

from meshwen.engine.step_inputs import (
    RowTokens,
    copied,
    in_parts,
    step_inputs,
    tables_in_order,
)

TABLES = np.arange(18, dtype=np.int32).reshape(6, 3)


def made(*parts, rows=3, count=8, every=False) -> dict[str, list[int] | None]:
    tables = TABLES[: len(parts) * rows]
    found = step_inputs(parts, rows, count, tables, every=every)._asdict()
    assert found.pop("tables") is tables
    assert all(array.dtype == np.int32 for array in found.values() if array is not None)
    return {name: None if array is None else array.tolist() for name, array in found.items()}


def test_each_part_has_its_tokens_and_padding_behind():
    first = [RowTokens(0, 4, [50]), RowTokens(2, 1, [10, 11, 12], samples=False)]
    second = [RowTokens(1, 0, [20, 21])]
    assert made(first, second) == {
        "token_ids": [50, 10, 11, 12, *[0] * 4, 20, 21, *[0] * 6],
        "positions": [4, 1, 2, 3, *[0] * 4, 0, 1, *[0] * 6],
        "query_starts": [0, 1, 1, 4, 0, 0, 2, 2],
        "lengths": [5, 0, 4, 0, 2, 0],
        "asked": [0, -1, -1, -1, 1, -1],
        "sampler_rows": None,
    }


def test_tokens_asked_for_alone_are_in_the_places_of_their_rows():
    first = [RowTokens(0, 4, [50]), RowTokens(2, 1, [10, 11, 12])]
    second = [RowTokens(1, 0, [20, 21]), RowTokens(2, 7, [], after=1)]
    found = step_inputs([first, second], 3, 8, TABLES).of_asked()
    assert found.asked.tolist() == [0, -1, 2, -1, 1, 2]
    assert found.positions[found.asked >= 0].tolist() == [4, 3, 1, 1]
    assert found.asked.dtype == found.positions.dtype == np.int32
    assert (found.token_ids, *found.where[1:], found.sampler_rows) == (None,) * 5


def test_with_drafts_each_token_is_sampled_after_with_the_parameters_of_its_row():
    first = [RowTokens(0, 4, [50, 51]), RowTokens(2, 1, [10, 11, 12])]
    found = made(first, [RowTokens(1, 0, [20])], every=True)
    assert found["asked"] == [0, 1, 2, 3, 4, -1, -1, -1, 0, *[-1] * 7]
    assert found["sampler_rows"][:5] == [0, 0, 2, 2, 2]
    assert found["sampler_rows"][8] == 1


def test_a_row_without_tokens_is_sampled_for_after_the_last_token_of_another():
    part = [RowTokens(0, 3, [10, 11]), RowTokens(1, 0, [20]), RowTokens(2, 5, [], after=0)]
    found = made(part)
    assert found["asked"] == [1, 2, 1]
    assert found["query_starts"] == [0, 2, 3, 3]
    assert found["lengths"] == [5, 1, 0]


def test_copies_of_blocks_are_padded_to_a_power_of_two_by_the_null_block():
    source, destination = copied([[(5, 6), (5, 7), (8, 9)], [], [(2, 3)]])
    assert source.tolist() == [5, 5, 8, 0, 0, 0, 0, 0, 2, 0, 0, 0]
    assert destination.tolist() == [6, 7, 9, 0, 0, 0, 0, 0, 3, 0, 0, 0]
    assert source.dtype == destination.dtype == np.int32


def test_rows_of_equally_many_tokens_are_split_over_parts():
    found = in_parts([[1, 2], [3, 4], [5, 6], [7, 8]], np.array([0, 9, 8, 7]), 2)
    assert found == [
        [RowTokens(0, 0, [1, 2]), RowTokens(1, 9, [3, 4])],
        [RowTokens(0, 8, [5, 6]), RowTokens(1, 7, [7, 8])],
    ]


def test_tables_in_order_leave_out_the_null_block():
    assert tables_in_order(2, 2, 3).tolist() == [[1, 2, 3], [4, 5, 6]] * 2
