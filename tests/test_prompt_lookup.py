# SPDX-License-Identifier: Apache-2.0
"""Draft tokens from what came before, and that no answer depends on them."""

from dataclasses import replace

from drafting import CONTEXT, GREEDY, PROMPTS, repeating, run
from meshwen.engine.prompt_lookup import PromptLookup, SequenceLookup
from meshwen.engine.sampling_params import SamplingParams
from sequences import sequence

PENALIZED = SamplingParams(max_new_tokens=20, temperature=0, repetition_penalty=1.2)


def test_what_followed_the_last_tokens_is_drafted_again():
    assert SequenceLookup([1, 2, 3, 4, 5, 6, 9, 2, 3]).drafts(3) == [4, 5, 6]


def test_longer_ngrams_and_later_places_come_first():
    assert SequenceLookup([1, 2, 3, 7, 8, 2, 3, 9, 1, 2, 3]).drafts(2) == [7, 8]
    assert SequenceLookup([2, 3, 7, 7, 2, 3, 9, 9, 2, 3]).drafts(2) == [9, 9]


def test_nothing_is_drafted_where_nothing_was_there_before():
    assert SequenceLookup([]).drafts(4) == []
    assert SequenceLookup([5]).drafts(4) == []
    assert SequenceLookup([1, 2, 3, 4]).drafts(4) == []


def test_an_ngram_that_repeats_itself_is_drafted_to_go_on():
    assert SequenceLookup([1, 2, 3, 1, 2, 3, 1, 2]).drafts(7) == [3, 1, 2, 3, 1, 2, 3]
    assert SequenceLookup([4, 4, 4]).drafts(3) == [4, 4, 4]


def test_tokens_that_are_drawn_are_looked_up_too():
    lookup = SequenceLookup([1, 2])
    lookup.extend((8, 9, 1, 2))
    assert lookup.drafts(2) == [8, 9]


def test_wrong_drafts_make_it_pause_longer_each_time_and_right_ones_end_that():
    lookup = SequenceLookup([4, 4, 4])

    def steps_until_the_next() -> int:
        return next(n for n in range(100) if lookup.drafts(1))

    pauses = []
    for _ in range(8):
        lookup.report_accepted(0)
        pauses.append(steps_until_the_next())
    assert pauses == [1, 3, 7, 15, 31, 32, 32, 32]
    lookup.report_accepted(1)
    assert steps_until_the_next() == 0


def test_each_sequence_of_a_batch_has_a_lookup_that_keeps_up_with_it():
    drafter = PromptLookup()
    one, other = sequence(0, [1, 2, 8, 9, 1]), sequence(1, [3, 4, 5])
    assert drafter.propose({0: one, 2: other}, 2) == {}
    one.append(2, None)
    for token in (3, 4):
        other.append(token, None)
    assert drafter.propose({2: one, 3: other}, 2) == {2: [8, 9], 3: [5, 3]}  # In other rows.
    drafter.report_accepted(other, 0)
    assert drafter.propose({2: one, 3: other}, 1) == {2: [8]}


def test_nothing_is_kept_of_a_sequence_that_is_forgotten():
    drafter, one = PromptLookup(), sequence()
    drafter.propose({0: one}, 2)
    for _ in range(2):
        drafter.forget(one)
    assert drafter._of == {}


def test_drafts_that_are_looked_up_change_no_exact_answer():
    plain, steps = run(PROMPTS, GREEDY, 0)
    drafted, fewer = run(PROMPTS, GREEDY, 5)
    assert [c.tokens for c in drafted] == [c.tokens for c in plain]
    assert [c.logprobs for c in drafted] == [c.logprobs for c in plain]
    assert [c.top_logprobs for c in drafted] == [c.top_logprobs for c in plain]
    assert {1, 6} <= set(fewer) <= set(range(1, 7))  # Fewer where the context ends.
    assert len(fewer) < len(steps)


def test_a_stop_or_a_limit_amid_drafts_ends_an_answer_there():
    (plain, *_), _ = run([[3] * 30] * 2, GREEDY, 0)
    limits = [replace(GREEDY, max_new_tokens=limit) for limit in range(1, 9)]
    found, steps = run([[3] * 30] * 9, [GREEDY, *limits], 5)
    assert 6 in steps
    for one, sampling in zip(found[1:], limits, strict=True):
        assert one.tokens == plain.tokens[: sampling.max_new_tokens]
        assert one.finish_reason == "length"
    end = plain.tokens[20]
    found, _ = run([[3] * 30] * 2, GREEDY, 5, eos=[end])
    for one in found:
        assert one.tokens == plain.tokens[: plain.tokens.index(end) + 1]
        assert one.finish_reason == "stop"


def test_an_answer_may_reach_the_end_of_the_context_with_drafts():
    prompts = [repeating(32, 4)] * 2
    (plain, *_), _ = run(prompts, replace(GREEDY, max_new_tokens=200), 0)
    (drafted, *_), steps = run(prompts, replace(GREEDY, max_new_tokens=200), 15)
    assert 16 in steps
    assert len(plain.tokens) == CONTEXT - 32
    assert drafted.tokens == plain.tokens


def test_nothing_is_drafted_with_a_repetition_penalty_or_for_many_answers():
    plain, _ = run(PROMPTS, PENALIZED, 0)
    found, steps = run(PROMPTS, PENALIZED, 5)
    assert [c.tokens for c in found] == [c.tokens for c in plain]
    assert set(steps) == {1}
    _, steps = run([repeating(20, i) for i in range(8)], GREEDY, 5, rows=8)
    assert set(steps) == {1}
