# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a prompt, collected from whatever chunks it is prefilled in."""

import numpy as np
import pytest

from meshwen.engine import prompt_logprobs
from meshwen.engine.prompt_logprobs import PromptLogprobs
from meshwen.engine.request import Request
from meshwen.engine.sampling_params import SamplingParams

PROMPT = tuple(range(10, 22))


def collected(**sampling) -> PromptLogprobs:
    found = PromptLogprobs.of(Request(PROMPT, SamplingParams(prompt_logprobs=True, **sampling)))
    assert found is not None
    return found


def step(start: int, count: int):
    """What a step finds after each position: values that name it."""
    positions = np.arange(start, start + count)
    tops = positions[:, None] + np.array([100, 200, 300])
    return -positions.astype(np.float32), tops, -tops.astype(np.float32)


def test_who_does_not_ask_for_them_has_none():
    assert PromptLogprobs.of(Request(PROMPT, SamplingParams(logprobs=True))) is None


@pytest.mark.parametrize(
    "chunks",
    [
        [(0, 12)],
        [(0, 16)],  # With padding behind the prompt.
        [(0, 4), (4, 4), (8, 4)],
        [(0, 1), (1, 16)],
        [(0, 8), (0, 4), (4, 8)],  # Prefilled again.
        [(0, 12), (0, 16)],
        [(0, 6), (2, 9), (11, 4)],
    ],
)
def test_each_token_has_its_own_whatever_the_chunks(chunks):
    found = collected(top_logprobs=2)
    for start, count in chunks:
        found.push(start, *step(start, count))
    assert found.logprobs == (None, *(-float(p) for p in range(11)))
    tops = tuple(((p + 100, -100.0 - p), (p + 200, -200.0 - p)) for p in range(11))
    assert found.top_logprobs == (None, *tops)
    assert {type(token) for top in found.top_logprobs[1:] for token, _ in top} == {int}
    assert found.is_finite


def test_an_interrupt_parts_no_token_from_the_likeliest_in_its_place(monkeypatch):
    found, calls, paired = collected(top_logprobs=1), [], prompt_logprobs.paired

    def interrupted(*arrays):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return paired(*arrays)

    monkeypatch.setattr(prompt_logprobs, "paired", interrupted)
    with pytest.raises(KeyboardInterrupt):
        found.push(0, *step(0, 12))
    found.push(0, *step(0, 12))
    assert found.logprobs == (None, *(-float(p) for p in range(11)))
    assert found.top_logprobs == (None, *(((p + 100, -100.0 - p),) for p in range(11)))


def test_targets_are_the_tokens_that_follow_and_end_with_the_prompt():
    found = collected()
    assert found.targets(0, 4).tolist() == [11, 12, 13, 14]
    assert found.targets(9, 5).tolist() == [20, 21, 0, 0, 0]
    assert found.targets(30, 2).tolist() == [0, 0]
    assert found.targets(0, 4).dtype == np.int32


def test_what_follows_the_prompt_may_be_anything_and_what_is_of_it_may_not():
    found = collected()
    found.push(0, np.float32([-1] * 11 + [np.nan]))
    assert found.is_finite
    found = collected()
    found.push(0, np.float32([-1, np.nan]))
    assert not found.is_finite
