# SPDX-License-Identifier: Apache-2.0
"""How long answers may become, and what they need of the cache."""

import pytest

from meshwen.cache.budget import CacheBudget
from meshwen.engine.limits import SequenceLimits
from meshwen.engine.request import Request
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError
from sequences import sequence


def limits(positions=1000, max_model_len=500) -> SequenceLimits:
    return SequenceLimits(CacheBudget(4, max_model_len, 1, 1, positions), score_heads=1)


def request(**sampling) -> Request:
    return Request((1,) * 20, SamplingParams(**sampling))


@pytest.mark.parametrize(
    ("positions", "asked", "expected"),
    [
        (1000, {"max_new_tokens": 30}, 30),
        (1000, {"max_new_tokens": 900}, 480),  # To the end of the context.
        (1000, {"max_new_tokens": 900, "max_length": 25}, 5),
        (70, {"max_new_tokens": 900}, 480),  # It was asked for: there is memory, or it is refused.
        (70, {"max_new_tokens": 900, "max_new_tokens_asked": False}, 44),  # 64 positions.
        (70, {"max_new_tokens": 30, "max_new_tokens_asked": False}, 30),
    ],
)
def test_an_answer_ends_by_what_was_asked_the_context_or_else_memory(positions, asked, expected):
    found = limits(positions)
    assert found.answer_tokens(request(**asked)) == expected
    allowed = found.allowed_tokens(request(**asked))
    assert allowed == min(asked["max_new_tokens"], asked.get("max_length", 500) - 20)


@pytest.mark.parametrize(
    ("length", "score_heads", "expected"),
    [
        (1200, 14, [512, 512, 192]),
        (9000, 14, [256] * 35 + [48]),  # 14 heads x 12,288 positions x 256 tokens: 176 MB.
        (9000, 0, [512] * 17 + [384]),  # No scores are written to memory.
        (100_000, 2000, [16] * 6250),
    ],
)
def test_chunks_of_a_prompt_are_as_long_as_memory_for_scores_allows(length, score_heads, expected):
    found = SequenceLimits(CacheBudget(4, 200_000, 1, 1, 200_000), score_heads).chunks(length)
    assert found == expected


def test_a_request_without_memory_for_all_that_was_asked_is_refused():
    limits(64).check_memory(request(max_new_tokens=44))
    with pytest.raises(MeshwenError, match="KV cache"):
        limits(64).check_memory(request(max_new_tokens=45))
    limits(64).check_memory(request(max_new_tokens=900, max_new_tokens_asked=False))
    with pytest.raises(MeshwenError, match="KV cache"):  # Not even the prompt fits.
        limits(16).check_memory(request(max_new_tokens=900, max_new_tokens_asked=False))


@pytest.mark.parametrize(
    ("prompt", "tokens", "limit", "expected"),
    [
        (40, 0, 10, 50),
        (33, 0, 2, 48),  # Chunks are written whole.
        (40, 0, 900, 40 + 256),
        (40, 30, 900, 70 + 256),  # Where an answer is resumed.
        (30, 30, 40, 70),
    ],
)
def test_a_sequence_needs_room_for_its_chunks_and_some_of_its_answer(
    prompt, tokens, limit, expected
):
    one = sequence(prompt=[1] * prompt, tokens=[2] * tokens, limit=limit)
    assert limits(10**6, 5000).positions_to_begin(one) == expected
