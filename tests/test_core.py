# SPDX-License-Identifier: Apache-2.0
"""The step loop over a runner that takes no time: whatever else runs, an answer is its own."""

import random
import zlib

import jax
import numpy as np
import pytest

from meshwen.cache.budget import CacheBudget
from meshwen.engine.core import EngineCore
from meshwen.engine.prompt_lookup import PromptLookup
from meshwen.engine.sampling import Sampled
from meshwen.engine.sequence import SequenceState
from meshwen.engine.speculation import Speculation
from meshwen.parallel.mesh import make_mesh
from meshwen.parallel.plan import ParallelPlan
from sequences import sequence
from tiny_model import ONE_LAYER


def following(tokens) -> int:
    """The token after others: by the first and the last three, so that answers repeat."""
    return zlib.crc32(np.asarray([tokens[0], *tokens[-3:]], np.int64).tobytes()) % 7


def alone(one: SequenceState) -> list[int]:
    tokens = list(one.request.prompt_tokens)
    while len(tokens) < len(one.request.prompt_tokens) + one.limit:
        tokens.append(following(tokens))
    return tokens[len(one.request.prompt_tokens) :]


class Runner:
    """A runner without a model, whose cache has tokens in the place of keys and values."""

    score_heads = 0

    def __init__(self, mesh: str):
        self.plan = ParallelPlan(ONE_LAYER.sizes, make_mesh(mesh))
        self.widths, self.resizes = set(), 0

    def empty_cache(self, batch, length):
        return np.full((batch, length), -1)

    def resized(self, cache, batch, length):
        self.resizes += 1
        parts, (rows, old) = self.plan.data_devices, cache.shape
        new = np.full((parts, batch // parts, length), -1)
        new[:, : rows // parts, :old] = cache.reshape(parts, -1, old)
        return new.reshape(batch, length)

    def without_row(self, cache, row):
        cache[row] = -1
        return cache

    def empty_hidden(self, batch):
        return np.zeros(batch, np.int32)

    def prefill(self, cache, hidden, token_ids, rows, start, lengths, positions):
        parts = cache.reshape(len(rows), -1, cache.shape[1])
        end = start + token_ids.shape[1]
        assert end <= positions <= cache.shape[1]
        for part, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if length > start:
                parts[part, row, start:end] = token_ids[part]
            if start < length <= end:
                hidden[part] = following(parts[part, row, :length])
        return hidden, cache

    def first(self, hidden, positions, rows, penalized, method):
        return Sampled(jax.device_put(hidden.copy()), None)

    def decode(self, cache, tokens, positions, rows, penalized, method):
        self.widths.add(tokens.shape[1])
        assert (positions + tokens.shape[1] <= cache.shape[1]).all()
        sampled = np.zeros_like(tokens)
        for row, position in enumerate(positions):
            for i, token in enumerate(tokens[row]):
                cache[row, position + i] = token
                sampled[row, i] = following(cache[row, : position + i + 1])
        return Sampled(jax.device_put(sampled), None), None, cache


class DraftModel:
    """A drafter with a cache of its own: the tokens whose keys and values it would hold."""

    def __init__(self):
        self.cached: dict[int, list[int]] = {}
        self.accepted, self.forgotten = [], []

    def propose(self, sequences, count):
        return {row: self._drafts(one, count) for row, one in sequences.items()}

    def _drafts(self, one, count):
        cached = self.cached.setdefault(one.number, [])
        assert tuple(cached) == one.token_ids[: len(cached)]
        cached += one.token_ids[len(cached) :]
        for _ in range(count):
            cached.append((following(cached) + (len(cached) % 5 == 0)) % 7)
        return cached[-count:]

    def report_accepted(self, sequence, count):
        del self.cached[sequence.number][sequence.length + count :]
        self.accepted.append(count)

    def forget(self, sequence):
        del self.cached[sequence.number]
        self.forgotten.append(sequence.number)


def core(mesh="1", max_num_seqs=4, positions=10**6, drafts=0, drafter=None) -> EngineCore:
    """One whose cache may have so many positions in all rows of a part."""
    runner = Runner(mesh)
    budget = CacheBudget(max_num_seqs, 1100, runner.plan.data_devices, 1, positions)
    return EngineCore(runner, budget, Speculation(drafter or PromptLookup(), drafts))


def finish(steps: EngineCore, *sequences: SequenceState) -> None:
    """Takes steps until all these have ended."""
    for _ in range(5000):
        if all(one.ended for one in sequences):
            return
        steps.step()
    pytest.fail("5000 steps were not enough")


@pytest.mark.parametrize(
    ("mesh", "max_num_seqs", "positions", "drafts"),
    [
        ("1", 4, 10**6, 0),
        ("1", 2, 900, 5),
        ("data=2,model=4", 4, 10**6, 3),
        ("data=2,model=4", 8, 1000, 0),
    ],
)
def test_an_answer_is_the_same_whatever_else_comes_and_goes(
    mesh, max_num_seqs, positions, drafts, monkeypatch
):
    monkeypatch.setattr("meshwen.engine.limits._AHEAD", 8)  # So that rows are extended often.
    draw, steps = random.Random(0), core(mesh, max_num_seqs, positions, drafts)
    made: list[SequenceState] = []
    resumed, free = set(), steps.cache.free

    def freed(number, *, zero):
        resumed.update({number} - {one.number for one in made if one.ended})
        free(number, zero=zero)

    monkeypatch.setattr(steps.cache, "free", freed)
    for _ in range(300):
        new = []
        if draw.random() < 0.2:
            prompt = [draw.randrange(7) for _ in range(draw.choice((1, 5, 30, 250, 600)))]
            limit = min(draw.choice((1, 3, 20, 300)), 768 - len(prompt))
            new = [sequence(len(made), prompt, limit=limit)]
            made += new
        running = [one for one in made if not one.ended]
        cancel = draw.random() < 0.05 and bool(running)
        if cancel:
            draw.choice(running).cancelled = True
        steps.step(new, drop_cancelled=cancel)
    finish(steps, *made)
    done = [one for one in made if not one.cancelled]
    assert len(done) > 30
    assert all(one.finish_reason == "length" for one in done)
    assert all(one.tokens == alone(one) for one in done)
    assert steps.runner.widths == {1, 1 + drafts}
    assert steps.runner.resizes
    # Where memory is short, answers wait, and are prefilled again.
    assert bool(resumed) == (positions < 10**6)


def test_a_core_that_was_cleared_is_as_new():
    steps = core()
    steps.step([sequence(0, [1] * 600, limit=5), sequence(1, limit=500)])
    steps.clear()
    assert (steps.scheduler.prefill, steps.cache.batch_size) == (None, 0)
    one = sequence(2, limit=5)
    steps.step([one])
    finish(steps, one)
    assert one.tokens == alone(one)


def test_a_draft_model_learns_what_of_its_cache_stands_and_what_has_ended():
    drafter = DraftModel()
    steps = core(drafts=3, drafter=drafter)
    made = [sequence(n, range(n + 1), limit=20 + n) for n in range(6)]
    steps.step(made[:3])
    for _ in range(3):
        steps.step()
    made[0].cancelled = True
    steps.step(made[3:], drop_cancelled=True)
    assert drafter.forgotten == [0]
    finish(steps, *made)
    assert all(one.tokens == alone(one) for one in made[1:])
    assert set(drafter.accepted) >= {0, 3}
    assert sorted(drafter.forgotten) == list(range(6))
    assert drafter.cached == {}


def test_a_draft_model_forgets_what_a_cleared_core_has_lost():
    drafter = DraftModel()
    steps = core(drafts=3, drafter=drafter)
    steps.step([sequence(0, limit=50), sequence(1, limit=50)])
    for _ in range(3):
        steps.step()
    assert drafter.cached
    steps.clear()
    assert drafter.cached == {}


def test_an_error_of_a_callback_ends_its_sequence_and_frees_its_row():
    def fails(event):
        raise OSError("gone")

    steps = core(max_num_seqs=1)
    bad, good = sequence(0, limit=5, on_event=fails), sequence(1, limit=5)
    steps.step([bad, good])
    finish(steps, bad, good)
    assert (len(bad.tokens), good.tokens) == (1, alone(good))
    assert [(n, str(error)) for n, error in steps.delivery.take_errors()] == [(0, "gone")]
