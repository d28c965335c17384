# SPDX-License-Identifier: Apache-2.0
"""Compiles the steps of most requests before the first one comes."""

from __future__ import annotations

import secrets
from itertools import takewhile

from meshwen.engine.engine import Engine
from meshwen.engine.request import Request
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError

_PROMPTS = (512, 100, 20)  # Tokens; longer prompts are computed in chunks of the longest.
_SHORT = 8  # Tokens of the prompts of a full batch, which all begin in one step.
_ANY_TEXT = r"start: /(.|\n)*/"


def warm_up(engine: Engine) -> None:
    """Answers requests of its own: prompts of some lengths, and batches of every size.

    Nobody else finds their prompts in the KV cache. Nobody else may use the engine meanwhile.
    """
    plan, greedy, drawn = engine.cache_plan, 0.0, 1.0
    for length in _PROMPTS:
        _answer(engine, 1, min(length, plan.longest - 4), greedy)
    most = plan.max_num_seqs
    powers = takewhile(lambda rows: rows < most, (1 << n for n in range(16)))
    for rows in (*powers, most):
        _answer(engine, rows, min(_SHORT, plan.longest - 4), greedy)
    for rows in dict.fromkeys((1, most)):
        _answer(engine, rows, min(_SHORT, plan.longest - 4), drawn)
    if _has_grammars(engine):
        for rows in dict.fromkeys((1, most)):
            _answer(engine, rows, min(_SHORT, plan.longest - 4), greedy, _ANY_TEXT)


def _has_grammars(engine: Engine) -> bool:
    """Whether answers can be held to forms; what that takes is then made."""
    try:
        engine.check_grammar(_ANY_TEXT)
    except MeshwenError:
        return False
    return True


def _answer(
    engine: Engine, rows: int, length: int, temperature: float, grammar: str | None = None
) -> None:
    """Answers as many prompts at the same time."""
    salt = secrets.token_hex(16)
    sampling = SamplingParams(
        max_new_tokens=3, temperature=temperature, ignore_eos=True, grammar=grammar
    )
    last = engine.config.vocab_size - 1
    prompts = [tuple([min(row + 1, last)] * max(length, 1)) for row in range(rows)]
    with engine.run([Request(prompt, sampling, salt) for prompt in prompts]) as events:
        for _ in events:
            pass
