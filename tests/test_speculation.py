# SPDX-License-Identifier: Apache-2.0
"""When steps have draft tokens, which of them count, and that no answer depends on them."""

from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from drafting import PROMPTS, run
from meshwen.engine.request import Completion
from meshwen.engine.sampling_params import SamplingParams
from meshwen.engine.speculation import Speculation
from sequences import sequence
from tiny_model import ONE_LAYER

SAMPLED = SamplingParams(max_new_tokens=40, temperature=0.7, top_p=0.9, seed=3, logprobs=True)
WHOLE = SamplingParams(max_new_tokens=30, temperature=0.4, seed=5, logprobs=True)


class Constant:
    """Drafts of one kind, and a note of what became of them."""

    def __init__(self, drafts=(7, 8, 9)):
        self.drafts, self.asked, self.reported, self.forgotten = drafts, [], [], []

    def propose(self, sequences, count):
        self.asked.append((sorted(sequences), count))
        return dict.fromkeys(sequences, self.drafts[:count])

    def report_accepted(self, sequence, count):
        self.reported.append((sequence.number, count))

    def forget(self, sequence):
        self.forgotten.append(sequence.number)


def sampler(penalize=False, constrained=False):
    return SimpleNamespace(method=SimpleNamespace(penalize=penalize), constrained=constrained)


def test_each_row_gets_what_the_drafter_proposes():
    drafter = Constant()
    running = {0: sequence(0), 3: sequence(1)}
    found = Speculation(drafter, 2).drafts(running, 4, sampler())
    assert found == {0: (7, 8), 3: (7, 8)}
    assert drafter.asked == [([0, 3], 2)]
    assert Speculation(Constant(()), 2).drafts(running, 4, sampler()) == {}


@pytest.mark.parametrize(
    ("num_tokens", "rows", "options", "any_drafts"),
    [
        (3, 8, {}, True),
        (0, 8, {}, False),
        (3, 9, {}, False),  # 36 tokens.
        (3, 8, {"penalize": True}, False),
        (3, 8, {"constrained": True}, True),
    ],
)
def test_there_are_no_drafts_where_they_cannot_or_should_not_be(
    num_tokens, rows, options, any_drafts
):
    drafter = Constant()
    speculation = Speculation(drafter, num_tokens)
    running = {0: sequence()}
    found = speculation.drafts(running, rows, sampler(**options))
    assert bool(found) == bool(drafter.asked) == any_drafts


@pytest.mark.parametrize(
    ("sampled", "accepted"),
    [((7, 8, 9, 1), 3), ((7, 8, 1, 9), 2), ((1, 8, 9, 1), 0), ((7, 1, 9, 1), 1)],
)
def test_drafts_count_up_to_the_first_wrong_one(sampled, accepted):
    drafter = Constant()
    assert Speculation(drafter, 3).accept(sequence(4), (7, 8, 9), sampled) == accepted
    assert drafter.reported == [(4, accepted)]


def test_the_drafter_learns_of_drafts_that_there_was_no_room_for():
    drafter = Constant()
    Speculation(drafter, 3).refuse(sequence(4))
    assert drafter.reported == [(4, 0)]


def test_nothing_is_reported_of_a_row_without_drafts():
    drafter = Constant()
    assert Speculation(drafter, 3).accept(sequence(), (), (7, 8, 9, 1)) == 0
    assert drafter.reported == []


def test_the_drafter_forgets_each_sequence_that_it_was_given_once():
    drafter = Constant()
    speculation, running = Speculation(drafter, 2), {n: sequence(n) for n in range(4)}
    speculation.drafts({n: running[n] for n in range(3)}, 4, sampler())
    speculation.forget_ended()
    assert drafter.forgotten == []
    running[1].cancelled = running[3].cancelled = True
    for _ in range(2):
        speculation.forget_ended()
    assert drafter.forgotten == [1]
    for _ in range(2):
        speculation.clear()
    assert drafter.forgotten == [1, 0, 2]


# --- In answers


class Scripted:
    """Drafts those answers, but for every `wrong`-th token; of odd requests one token less."""

    def __init__(self, answers: list[Completion], wrong: int):
        self._answers, self._wrong = answers, wrong
        self.accepted = 0
        self.forgotten = []

    def propose(self, sequences, count):
        return {row: self._drafts(one, count - one.number % 2) for row, one in sequences.items()}

    def _drafts(self, sequence, count):
        answer = [*self._answers[sequence.number].tokens, *[0] * count]
        at = len(sequence.tokens)
        return [
            (answer[i] + (i % self._wrong == 0)) % ONE_LAYER.vocab_size
            for i in range(at, at + count)
        ]

    def report_accepted(self, sequence, count):
        self.accepted += count

    def forget(self, sequence):
        self.forgotten.append(sequence.number)


# Another kind of layer, and heads that kernels need not pad.
WIDE = replace(ONE_LAYER, head_dim=32, layer_types=("full_attention",))


@pytest.mark.parametrize(
    ("mesh", "dtype", "config", "sampling"),
    [
        ("1", np.float32, ONE_LAYER, SAMPLED),
        ("data=2,model=2", jnp.bfloat16, WIDE, WHOLE),
    ],
    ids=["top-p", "whole, on a mesh"],  # Greedily: `test_prompt_lookup.py`.
)
def test_exact_answers_are_the_same_to_the_bit_and_take_fewer_steps(mesh, dtype, config, sampling):
    plain, steps = run(PROMPTS, sampling, 0, mesh, dtype=dtype, config=config)
    for wrong in (4, 7, 100):
        drafter = Scripted(plain, wrong)
        options = {"dtype": dtype, "config": config, "drafter": drafter}
        drafted, fewer = run(PROMPTS, sampling, 5, mesh, **options)
        assert [c.tokens for c in drafted] == [c.tokens for c in plain]
        assert [c.logprobs for c in drafted] == [c.logprobs for c in plain]
        assert set(steps) == {1}
        assert 6 in fewer
        assert len(fewer) < 0.5 * len(steps)
        assert drafter.accepted
