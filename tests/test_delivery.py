# SPDX-License-Identifier: Apache-2.0
"""From sampled tokens to events, and what their callbacks raise."""

import numpy as np
import pytest

from meshwen.engine.delivery import Delivery
from meshwen.engine.sampling import NO_TOKEN
from sequences import sequence


def begun(**options):
    """A sequence whose prefill has begun, and its events."""
    events = []
    one = sequence(on_event=events.append, **options)
    one.timer.begin()
    return one, events


def test_tokens_become_events_and_the_last_has_the_whole_answer():
    one, events = begun(number=3, limit=2, logprobs=True, temperature=1.0, seed=9)
    delivery = Delivery()
    delivery.deliver(one, 5, -0.5)
    delivery.deliver(one, 6, -1.5)
    assert [(e.request, e.token, e.logprob) for e in events] == [(3, 5, -0.5), (3, 6, -1.5)]
    first, last = (e.completion for e in events)
    assert first is None
    assert (last.tokens, last.logprobs, last.seed) == ((5, 6), (-0.5, -1.5), 9)
    assert (last.finish_reason, last.error, last.prompt_tokens) == ("length", None, (1, 2, 3))
    assert one.ended


def test_log_probabilities_go_to_those_who_asked():
    one, events = begun(limit=1)
    Delivery().deliver(one, 5, -0.5)
    assert (events[0].logprob, events[0].completion.logprobs) == (None, None)


def test_an_end_of_text_token_is_a_stop_also_at_the_limit():
    one, events = begun(limit=1, eos=(5,))
    Delivery().deliver(one, 5, None)
    assert events[0].completion.finish_reason == "stop"


@pytest.mark.parametrize(
    ("sampling", "eos", "reason", "stop_reason"),
    [
        ({"stop_token_ids": (4, 5)}, (), "stop", 5),
        ({"stop_token_ids": (4, 5)}, (5,), "stop", None),
        ({}, (5,), "stop", None),
        ({"stop_token_ids": (4,)}, (), "length", None),
    ],
)
def test_a_stop_token_ends_an_answer_and_is_its_reason(sampling, eos, reason, stop_reason):
    one, events = begun(limit=1, eos=eos, **sampling)
    Delivery().deliver(one, 5, None)
    found = events[0].completion
    assert (found.finish_reason, found.stop_reason, found.tokens) == (reason, stop_reason, (5,))


def test_likeliest_tokens_go_as_many_as_were_asked_for_to_those_who_asked():
    tops = (((5, -0.5), (7, -1.0), (2, -3.0)), ((7, -0.1), (6, -2.5), (1, -9.0)))
    some, no_top, nothing = (
        begun(limit=2, **asked)
        for asked in ({"logprobs": True, "top_logprobs": 2}, {"logprobs": True}, {})
    )
    for one, _ in (some, no_top, nothing):
        for token, top in zip((5, 6), tops, strict=True):
            Delivery().deliver(one, token, -0.5, top)
    events = some[1]
    assert [event.top_logprobs for event in events] == [top[:2] for top in tops]
    assert events[1].completion.top_logprobs == tuple(top[:2] for top in tops)
    for _, events in (no_top, nothing):
        assert [event.top_logprobs for event in events] == [None, None]
        assert events[1].completion.top_logprobs is None


def test_log_probabilities_of_the_prompt_are_in_the_completion():
    one, events = begun(limit=1, prompt_logprobs=True, top_logprobs=1)
    ids = np.array([[7, 5], [8, 5], [9, 5]])
    values = np.array([[-0.25, -1], [-0.5, -1], [-0.75, -1]], np.float32)
    one.prompt_logprobs.push(0, np.float32([-1, -2, -3]), ids, values)
    Delivery().deliver(one, 5, -0.5, ((5, -0.5),))
    found = events[0].completion
    assert found.prompt_logprobs == (None, -1.0, -2.0)
    assert found.prompt_top_logprobs == (None, ((7, -0.25),), ((8, -0.5),))
    assert (found.logprobs, found.top_logprobs, events[0].top_logprobs) == (None, None, None)


def test_a_prompt_whose_log_probabilities_are_nan_is_an_error():
    one, events = begun(limit=1, prompt_logprobs=True)
    one.prompt_logprobs.push(0, np.float32([-1, np.nan]))
    Delivery().deliver(one, 5, None)
    completion = events[0].completion
    assert (completion.finish_reason, completion.stop_reason) == ("error", None)
    assert "logits for a token of the prompt are NaN" in completion.error


@pytest.mark.parametrize(("token", "logprob"), [(NO_TOKEN, None), (5, float("nan"))])
def test_no_token_is_an_error_in_its_place(token, logprob):
    one, events = begun(tokens=[4], logprobs=True)
    Delivery().deliver(one, token, logprob)
    ((event),) = events
    assert event.token == NO_TOKEN
    assert (event.completion.finish_reason, event.completion.tokens) == ("error", (4,))
    assert "token 2 of the answer are NaN" in event.completion.error
    assert not event.completion.asked_too_much


def test_no_token_under_constraints_that_forbid_all_says_so():
    one, events = begun(suppress_tokens=range(100))
    Delivery().deliver(one, NO_TOKEN, None)
    assert events[0].completion.error == (
        "the sampling parameters let nothing come as token 1 of the answer"
    )
    assert events[0].completion.asked_too_much


def test_what_a_callback_raises_cancels_its_own_request_alone():
    delivery, running = Delivery(), []

    def fails(event):
        running.append(delivery.delivering)
        raise OSError("gone")

    bad, (good, events) = sequence(4, on_event=fails), begun(number=5)
    delivery.deliver(bad, 7, None)
    delivery.deliver(good, 8, None)
    assert (bad.cancelled, good.cancelled, running) == (True, False, [4])
    assert [e.token for e in events] == [8]
    ((number, error),) = delivery.take_errors()
    assert (number, str(error)) == (4, "gone")
    assert delivery.take_errors() == []
    assert delivery.delivering is None


def test_when_an_answer_fails_the_others_of_its_request_get_nothing_more():
    delivery, called = Delivery(), []

    def fails(event):
        called.append(event.choice)
        raise OSError("gone")

    answers = [sequence(4 + choice, on_event=fails) for choice in range(3)]
    for choice, one in enumerate(answers):
        one.choice = choice
    other, events = begun(number=7)
    for one in (*answers, other):
        delivery.deliver(one, 5, None)
    assert called == [0]
    assert all(one.cancelled for one in answers)
    assert [e.token for e in events] == [5]
    ((number, _),) = delivery.take_errors()
    assert number == 4


def test_an_interrupt_leaves_whose_callback_was_running():
    delivery = Delivery()

    def interrupted(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        delivery.deliver(sequence(4, on_event=interrupted), 7, None)
    assert delivery.delivering == 4
    assert delivery.take_errors() == []
    delivery.clear()
    assert delivery.delivering is None
