# SPDX-License-Identifier: Apache-2.0
"""What threads share: unfinished requests, and what a step that broke off does to them."""

from types import SimpleNamespace

import pytest

from meshwen.engine.request_table import LiveRequest, RequestTable
from meshwen.engine.sequence import SequenceState
from meshwen.errors import MeshwenError
from sequences import sequence


def table(*requests: tuple[object, int]) -> RequestTable:
    """Requests 0, 1, ... of runs and threads, that a step has taken."""
    made = RequestTable()
    for run, thread in requests:
        made.add(LiveRequest((sequence(made.next_number(1)),), run, thread))
    made.take_new()
    return made


def run() -> SimpleNamespace:
    made = SimpleNamespace(failure=None, failed=[])
    made.fail = lambda number, error: made.failed.append((number, error))
    return made


def test_requests_are_numbered_and_left_for_the_next_step_once():
    made = RequestTable()
    one = sequence(made.next_number(1))
    made.add(LiveRequest((one,), None, 1))
    assert (one.number, made.next_number(2), made.waiting, made.busy) == (0, 1, 1, True)
    assert made.next_number(1) == 3
    assert made.take_new() == ([one], False)
    assert made.take_new() == ([], False)
    one.timer.begin()
    assert made.waiting == 0
    made.finish(0)
    assert made.busy  # It has not ended.
    one.finish_reason = "stop"
    made.finish(0)
    assert not made.busy


def test_a_cancelled_request_is_for_the_next_step_to_drop():
    made = table((None, 1), (None, 1))
    [one] = made.live[0].sequences
    made.cancel(0)
    made.cancel(0)
    made.cancel(7)
    assert (one.cancelled, sorted(made.live)) == (True, [1])
    assert made.take_new() == ([], True)
    assert made.take_new() == ([], False)


def several(made: RequestTable, count: int) -> list[SequenceState]:
    """The answers of a request, all but the first of which begin with it."""
    number = made.next_number(count)
    answers = [sequence(number + choice) for choice in range(count)]
    for choice, one in enumerate(answers):
        one.choice = choice
    answers[0].siblings += answers[1:]
    made.add(LiveRequest(tuple(answers), None, 1))
    return answers


def test_a_request_of_several_answers_is_finished_with_the_last_of_them():
    made = RequestTable()
    answers = several(made, 3)
    assert made.take_new() == (answers[:1], False)
    for one in answers:
        assert made.busy
        one.finish_reason = "length"
        made.finish(0)
    assert not made.busy


def test_an_interrupt_lets_the_answers_wait_that_have_not_ended():
    made = RequestTable()
    answers = several(made, 4)
    made.take_new()
    answers[0].siblings[:] = answers[3:]  # The others have begun.
    answers[1].finish_reason = "stop"
    made.lose(KeyboardInterrupt(), None, thread=1)
    assert made.take_new() == ([answers[0], answers[2]], False)


def test_all_requests_of_a_run_are_cancelled():
    mine, other = run(), run()
    made = table((mine, 1), (other, 1), (mine, 1))
    made.cancel_run(mine)
    assert list(made.live) == [1]


def test_an_error_is_raised_once_and_keeps_the_engine_busy_until_then():
    made, error = table((None, 1)), OSError("gone")
    made.fail(0, error)
    assert (made.live, made.busy) == ({}, True)
    assert made.take_errors() == [error]
    assert (made.take_errors(), made.busy) == ([], False)


def test_an_error_of_a_runs_request_goes_to_the_run():
    mine, error = run(), ValueError("no text")
    made = table((mine, 1), (mine, 1))
    made.fail(1, error)
    assert (mine.failed, list(made.live), made.take_errors()) == ([(1, error)], [0], [])


def test_an_error_ends_what_a_step_had_taken_and_says_so_to_all_but_its_own_thread():
    mine = run()
    made = table((mine, 1), (None, 2), (None, 3))
    new = sequence(made.next_number(1))
    made.add(LiveRequest((new,), None, 2))
    error = ZeroDivisionError()
    made.lose(error, delivering=1, thread=3)
    assert list(made.live) == [3]
    assert made.take_new() == ([new], False)
    (reported,) = made.take_errors()  # To thread 2: thread 3 gets the error itself.
    for failure in (reported, mine.failure):
        assert isinstance(failure, MeshwenError)
        assert failure.__cause__ is error


@pytest.mark.parametrize("delivering", [None, 1])
def test_an_interrupt_lets_all_wait_again_but_for_the_one_whose_token_was_delivered(delivering):
    made = table((run(), 1), (None, 2), (None, 3))
    made.add(LiveRequest((sequence(made.next_number(1)),), None, 2))
    made.lose(KeyboardInterrupt(), delivering, thread=3)
    left = [n for n in range(4) if n != delivering]
    assert list(made.live) == left
    assert [one.number for one in made.take_new()[0]] == left
    assert len(made.take_errors()) == (delivering is not None)
