# SPDX-License-Identifier: Apache-2.0
"""How long answers may become."""

import pytest

from meshwen.cache.budget import KVCachePlan
from meshwen.engine.limits import SequenceLimits
from meshwen.engine.request import Request
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError


def limits(blocks=1000, parts=1) -> SequenceLimits:
    """With so many blocks, of 16 positions, on each part, and a context of 500 tokens."""
    return SequenceLimits(KVCachePlan(blocks + 1, 16, 1, parts, 4, 500))


def request(**sampling) -> Request:
    return Request((1,) * 20, SamplingParams(**sampling))


@pytest.mark.parametrize(
    ("blocks", "asked", "expected"),
    [
        (1000, {"max_new_tokens": 30}, 30),
        (1000, {"max_new_tokens": 900}, 480),  # To the end of the context.
        (1000, {"max_new_tokens": 900, "max_length": 25}, 5),
        (1000, {"max_new_tokens": 900, "max_length": 900}, 480),
        (4, {"max_new_tokens": 900}, 480),  # It was asked for: there is memory, or it is refused.
        (4, {"max_new_tokens": 900, "max_new_tokens_asked": False}, 44),  # 64 positions.
        (4, {"max_new_tokens": 30, "max_new_tokens_asked": False}, 30),
        (4, {"max_new_tokens": 30, "max_length": 40, "max_new_tokens_asked": False}, 20),
    ],
)
@pytest.mark.parametrize("parts", [1, 3])  # A sequence is in one of them.
def test_an_answer_ends_by_what_was_asked_the_context_or_else_memory(
    blocks, asked, expected, parts
):
    found = limits(blocks, parts)
    assert found.answer_tokens(request(**asked)) == expected
    allowed = found.allowed_tokens(request(**asked))
    assert allowed == min(asked["max_new_tokens"], min(asked.get("max_length", 500), 500) - 20)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_request_without_memory_for_all_that_was_asked_is_refused(parts):
    four, one = limits(4, parts), limits(1, parts)
    four.check_memory(request(max_new_tokens=44))
    with pytest.raises(MeshwenError, match=r"65 tokens needs .* of KV cache"):
        four.check_memory(request(max_new_tokens=45))
    four.check_memory(request(max_new_tokens=900, max_new_tokens_asked=False))
    with pytest.raises(MeshwenError, match=r"21 tokens needs .* of KV cache"):
        one.check_memory(request(max_new_tokens=900, max_new_tokens_asked=False))
