# SPDX-License-Identifier: Apache-2.0
"""Sequences without an engine, for tests of its parts."""

from collections.abc import Callable, Iterable

from meshwen.engine.answer_text import AnswerText
from meshwen.engine.constraints import AnswerConstraints
from meshwen.engine.request import Event, Request
from meshwen.engine.sampling_params import SamplingParams
from meshwen.engine.sequence import SequenceState


def sequence(
    number: int = 0,
    prompt: Iterable[int] = (1, 2, 3),
    tokens: Iterable[int] = (),
    limit: int = 10,
    eos: Iterable[int] = (),
    on_event: Callable[[Event], None] = lambda event: None,
    **sampling,
) -> SequenceState:
    """A sequence that has had some tokens."""
    request = Request(tuple(prompt), SamplingParams(**{"max_new_tokens": limit} | sampling))
    text = AnswerText(None, request.sampling.stop)
    constraints = AnswerConstraints.of(request, limit, frozenset(eos), 100)
    made = SequenceState(number, request, limit, frozenset(eos), on_event, text, constraints)
    for token in tokens:
        made.append(token, None)
    return made
