# SPDX-License-Identifier: Apache-2.0
"""The step loop over a runner that takes no time: whatever else runs, an answer is its own."""

import itertools
import random
from collections import Counter

import pytest

from fake_runner import VOCAB, FakeRunner, answer, following, logprob, state
from meshwen.cache.budget import KVCachePlan
from meshwen.engine.core import EngineCore
from meshwen.engine.prompt_lookup import PromptLookup
from meshwen.engine.sequence import SequenceState
from meshwen.engine.speculation import Speculation
from meshwen.ops.cpu.xla import XlaOnCpu
from sequences import sequence

BLOCK = 4


class DraftModel:
    """A drafter with a cache of its own: the tokens whose keys and values it would hold."""

    def __init__(self):
        self.cached: dict[int, list[int]] = {}
        self.accepted, self.forgotten = [], []

    def propose(self, sequences, count):
        return {row: self._drafts(one, count) for row, one in sequences.items()}

    def _drafts(self, one, count):
        cached = self.cached.setdefault(one.number, [])
        assert cached == one.token_ids[: len(cached)]
        cached += one.token_ids[len(cached) :]
        for _ in range(count):
            wrong = len(cached) % 5 == 0
            cached.append((following(cached, one.request.sampling.seed) + wrong) % VOCAB)
        return cached[-count:]

    def report_accepted(self, sequence, count):
        del self.cached[sequence.number][sequence.length + count :]
        self.accepted.append(count)

    def forget(self, sequence):
        self.cached.pop(sequence.number, None)
        self.forgotten.append(sequence.number)


class WrongModel(DraftModel):
    """A drafter whose drafts are all wrong."""

    def _drafts(self, one, count):
        return [(token + 1) % VOCAB for token in super()._drafts(one, count)]


def core(
    mesh="1",
    seqs=4,
    blocks=1000,
    budget=64,
    drafts=0,
    drafter=None,
    prefix_caching=True,
    longest=1100,
) -> EngineCore:
    """One with so many blocks, of 4 positions, in each part of the batch."""
    runner = FakeRunner(mesh, BLOCK)
    plan = KVCachePlan(blocks + 1, BLOCK, 1, runner.plan.data_devices, seqs, longest)
    speculation = Speculation(drafter or PromptLookup(), drafts)
    return EngineCore(runner, plan, budget, prefix_caching, speculation)


def seeded(number: int, *arguments, **options) -> SequenceState:
    return sequence(number, *arguments, seed=number, **options)


def alone(one: SequenceState) -> list[int]:
    return answer(one.request.prompt_tokens, one.request.sampling.seed, one.limit)


def finish(steps: EngineCore, *sequences: SequenceState) -> None:
    """Takes steps until all these have ended."""
    for _ in range(5000):
        if all(one.ended for one in sequences):
            return
        steps.step()
    pytest.fail("5000 steps were not enough")


class Arrivals:
    """Requests at random, many of whose prompts begin alike; some want several answers."""

    def __init__(self, seed: int, longest: int):
        self.draw, self.longest, self.made = random.Random(seed), longest, []
        self._texts = [self._tokens(longest) for _ in range(3)]

    def _tokens(self, count: int) -> list[int]:
        return [self.draw.randrange(VOCAB) for _ in range(count)]

    def next(self) -> list[SequenceState]:
        if self.draw.random() > 0.2:
            return []
        prompt = self._tokens(self.draw.choice((1, 2, 5, 30)))
        if self.draw.random() < 0.6:
            prompt = self.draw.choice(self._texts)[: self.draw.randrange(120)] + prompt
        most = self.longest - len(prompt)
        limit = min(self.draw.choice((1, 3, 20, 100)), most)
        scored = self.draw.random() < 0.2
        first, *others = (
            seeded(len(self.made) + i, prompt, limit=limit, prompt_logprobs=scored)
            for i in range(self.draw.choice((1, 1, 1, 3)))
        )
        first.siblings = others
        self.made += [first, *others]
        return [first]

    def cancel(self) -> bool:
        running = [one for one in self.made if not one.ended]
        if not running or self.draw.random() > 0.05:
            return False
        one = self.draw.choice(running)
        for other in [one, *one.siblings]:  # Those that have not begun go with it.
            other.cancelled = True
        return True


def check_logprobs(one: SequenceState) -> None:
    """Holds those of a prompt to what follows its tokens alone."""
    prompt = one.request.prompt_tokens
    expected = [logprob(state(prompt[:i]), prompt[i]) for i in range(1, len(prompt))]
    assert one.prompt_logprobs.logprobs == (None, *expected)


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("1", {}),
        ("1", {"drafts": 7, "blocks": 45}),
        ("1", {"seqs": 8, "blocks": 60, "budget": 24}),
        ("1", {"seqs": 8, "drafts": 3, "blocks": 45, "budget": 16, "prefix_caching": False}),
        ("1", {"seqs": 1, "blocks": 40, "drafts": 2}),
        ("data=2,model=4", {"drafts": 3, "budget": 16}),
        ("data=2,model=4", {"seqs": 8, "blocks": 40, "drafts": 1, "budget": 5}),
        ("data=4", {"seqs": 4, "blocks": 50, "drafts": 2, "budget": 4}),
    ],
)
def test_an_answer_is_the_same_whatever_else_comes_and_goes(mesh, options):
    steps, few = core(mesh, **options), "blocks" in options
    arrivals = Arrivals(0, 4 * options["blocks"] if few else 300)
    for _ in range(150):
        new, cancelled = arrivals.next(), arrivals.cancel()
        steps.step(new, drop_cancelled=cancelled)
        steps.blocks.check()
    finish(steps, *arrivals.made)
    done = [one for one in arrivals.made if not one.cancelled]
    assert len(done) > 20
    for one in done:
        assert (one.finish_reason, one.tokens) == ("length", alone(one))
        if one.prompt_logprobs:
            check_logprobs(one)
    assert steps.blocks.used_blocks == 0
    cached = options.get("prefix_caching", True)
    stats, running = steps.blocks.stats, options.get("seqs", 4) / steps.runner.plan.data_devices
    assert bool(stats.cached_tokens) == cached
    assert bool(stats.evictions) == (few and cached)
    assert bool(steps.scheduler.preemptions) == (few and running > 1)


@pytest.mark.parametrize("mesh", ["1", "data=2"])
def test_steps_have_few_shapes(mesh):
    steps, arrivals = core(mesh, budget=32), Arrivals(1, 300)
    for _ in range(200):
        steps.step(arrivals.next())
    parts = steps.runner.plan.data_devices
    rows = {len(one.lengths) // parts for one in steps.runner.steps}
    counts = {len(one.token_ids) // parts for one in steps.runner.steps}
    assert rows <= {1, 2, 4}
    assert counts <= {1, 2, 4, 8, 16, 24, 32}
    assert max(counts) * parts == 32


def test_programs_for_every_size_of_step_and_three_ways_to_sample_are_fewer_than_are_kept():
    steps, numbers = core(seqs=32, budget=512, prefix_caching=False), itertools.count()
    sizes = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
    for sampling in ({}, {"temperature": 1.0, "top_k": 3}, {"presence_penalty": 1.0}):
        for running in (1, 2, 4, 8, 16, 31):
            others = [seeded(next(numbers), limit=50, **sampling) for _ in range(running)]
            steps.step(others)
            steps.step()
            for size in sizes:
                prompt = [0] * max(size - running, 1)
                steps.step([seeded(next(numbers), prompt, limit=1, **sampling)])
            for one in others:
                one.cancelled = True
            steps.step(drop_cancelled=True)
    programs = steps.runner.programs
    # With prompts for 8 sequences or 32, which have more than 8 tokens; else for 1, 2, 4, ... 32.
    expected = {"forward": 12 + 11, "sample": 2 * 3, "step": 6 * 3}
    assert Counter(name for name, *_ in programs) == expected
    assert len(programs) < XlaOnCpu.programs


def test_a_core_that_was_cleared_is_as_new():
    steps = core()
    steps.step([seeded(0, [1] * 600, limit=5), seeded(1, limit=500)])
    steps.clear()
    assert (steps.scheduler.prefilled, steps.blocks.used_blocks) == (None, 0)
    one = seeded(2, limit=5)
    steps.step([one])
    finish(steps, one)
    assert one.tokens == alone(one)
    assert steps.blocks.stats.cached_tokens == 0


def test_a_step_without_sequences_computes_nothing():
    steps = core()
    steps.step()
    assert steps.runner.steps == []
    one = seeded(0, limit=3)
    steps.step([one])
    finish(steps, one)
    steps.step()
    assert len(steps.runner.steps) == 3


@pytest.mark.parametrize("blocks", [1000, 12])
def test_a_draft_model_learns_what_of_its_cache_stands_and_what_has_ended(blocks):
    drafter = DraftModel()
    steps = core(drafts=3, drafter=drafter, blocks=blocks)
    made = [seeded(n, range(n + 1), limit=20 + n) for n in range(6)]
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
    assert bool(steps.scheduler.preemptions) == (blocks < 1000)


def test_a_draft_model_forgets_what_a_cleared_core_has_lost():
    drafter = DraftModel()
    steps = core(drafts=3, drafter=drafter)
    steps.step([seeded(0, limit=50), seeded(1, limit=50)])
    for _ in range(3):
        steps.step()
    assert drafter.cached
    steps.clear()
    assert drafter.cached == {}


@pytest.mark.parametrize("room", [{"blocks": 3}, {"longest": 12}, {"longest": 13}])
def test_drafts_end_with_the_room_for_a_sequence(room):
    steps = core(drafts=3, drafter=DraftModel(), seqs=1, **room)
    longest = room.get("longest", 12)
    one = seeded(0, limit=longest - 3)
    steps.step([one])
    finish(steps, one)
    assert one.tokens == alone(one)
    assert max(inputs.lengths.max() for inputs in steps.runner.steps) == longest


def test_drafts_take_no_block_that_another_sequence_needs_next():
    # One needs two blocks, the other three: its last when the first has a token left.
    steps = core(drafts=3, drafter=WrongModel(), seqs=2, blocks=5)
    made = [seeded(0, range(5), limit=4), seeded(1, range(10, 16), limit=7)]
    steps.step(made)
    finish(steps, *made)
    assert [one.tokens for one in made] == [alone(one) for one in made]
    assert steps.scheduler.preemptions == 0


def test_an_error_of_a_callback_ends_its_sequence_and_frees_its_row_and_blocks():
    def fails(event):
        raise OSError("gone")

    steps = core(seqs=1)
    bad, good = seeded(0, limit=5, on_event=fails), seeded(1, limit=5)
    steps.step([bad, good])
    finish(steps, bad, good)
    assert (len(bad.tokens), good.tokens) == (1, alone(good))
    assert [(n, str(error)) for n, error in steps.delivery.take_errors()] == [(0, "gone")]
    assert steps.blocks.used_blocks == 0


def test_an_answer_that_ends_where_memory_does_is_warned_of_once(caplog):
    steps = core(seqs=2, blocks=3)
    made = [
        seeded(n, [1] * 7, limit=5, max_new_tokens=50, max_new_tokens_asked=False) for n in (0, 1)
    ]
    steps.step(made)
    finish(steps, *made)
    (record,) = caplog.records
    assert "after 5 of the 50 tokens" in record.getMessage()
    assert "no memory for a KV cache of more than 12" in record.getMessage()
