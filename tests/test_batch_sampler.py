# SPDX-License-Identifier: Apache-2.0
"""The sampling parameters of a batch, as arrays, and the tokens that they let be drawn."""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from meshwen.engine.batch_sampler import BatchSampler
from meshwen.engine.sampling import NO_TOKEN, sample
from meshwen.ops.operations import Ops
from meshwen.parallel.mesh import make_mesh
from meshwen.parallel.plan import ParallelPlan
from meshwen.parallel.sizes import ModelSizes
from sequences import sequence

pytestmark = pytest.mark.usefixtures("unoptimised")
VOCAB = 6
SIZES = ModelSizes(vocab=VOCAB, embed=8, mlp=8, query_heads=2, key_value_heads=1, head_dim=4)
LOGITS = np.array([1, 5, 4, 3, 2, 0], np.float32)


def plan(mesh="1") -> ParallelPlan:
    return ParallelPlan(SIZES, make_mesh(mesh))


def samples(sequences):
    """One of each sequence, in its row."""
    return [(one, (), range(row, row + 1)) for row, one in sequences.items()]


def greedy(sampler: BatchSampler, sequences) -> list[int]:
    """The token that each row draws from the same logits."""
    size = len(sampler.rows.seed)
    rows = sampler.rows_of_step(samples(sequences), size)
    logits, positions = np.tile(LOGITS, (size, 1)), np.zeros(size, np.int32)
    program = jax.jit(partial(sample, vocab_size=VOCAB, method=sampler.method, ops=Ops()))
    return np.asarray(program(logits, rows, positions, sampler.penalized).tokens).tolist()


def test_each_sequence_has_its_parameters_in_its_row_and_free_rows_are_greedy():
    sequences = {
        2: sequence(0, temperature=0.5, top_k=3, seed=7),
        0: sequence(1, temperature=0, seed=8, logprobs=True),
    }
    sampler = BatchSampler.of(sequences, 4, plan())
    assert np.asarray(sampler.rows.seed)[[2, 0]].tolist() == [7, 8]
    assert np.asarray(sampler.rows.temperature).tolist() == [0, 0, 0.5, 0]
    assert np.asarray(sampler.rows.top_k)[2] == 3
    assert sampler.method.logprobs
    assert (sampler.penalized, sampler.rows.prompt, sampler.constrained) == (None, None, False)
    assert sampler.rows_of_step(samples(sequences), 4) is sampler.rows


def test_prompts_are_not_read_where_no_penalty_is_on_their_tokens():
    one = sequence(logit_bias={4: 1}, presence_penalty=1, frequency_penalty=1)
    one.request = SimpleNamespace(sampling=one.request.sampling)  # Without a prompt.
    assert BatchSampler.of({0: one}, 1, plan()).rows.prompt is None


@pytest.mark.parametrize(("mesh", "padded"), [("1", 6), ("4", 8), ("data=2,model=4", 8)])
def test_penalties_are_of_the_tokens_of_prompt_and_answer(mesh, padded):
    sequences = {
        1: sequence(0, prompt=[1], tokens=[2, 3], repetition_penalty=9.0),
        3: sequence(1, prompt=[5, 5], tokens=[4], encoder_repetition_penalty=2.0),
    }
    one = plan(mesh)
    sampler = BatchSampler.of(sequences, 4, one)
    assert sampler.penalized.tokens.sharding == one.sharding("batch", "vocab")
    assert sampler.penalized.counts is None
    prompt, penalized = np.asarray(sampler.rows.prompt), np.asarray(sampler.penalized.tokens)
    assert prompt.shape == penalized.shape == (4, padded)
    assert {row: np.flatnonzero(prompt[row]).tolist() for row in (1, 3)} == {1: [1], 3: [5]}
    assert np.flatnonzero(penalized[1]).tolist() == [1, 2, 3]
    assert not penalized[[0, 2]].any()


def test_answers_are_counted_and_biases_are_in_their_rows():
    sequences = {
        1: sequence(0, prompt=[1, 1], tokens=[2, 3, 2], frequency_penalty=0.5),
        3: sequence(1, prompt=[5], tokens=[4], presence_penalty=-1, logit_bias={0: 3, 5: -2.5}),
    }
    one = plan("4")
    sampler = BatchSampler.of(sequences, 4, one)
    assert sampler.method.penalize
    assert sampler.penalized.tokens is None
    assert sampler.penalized.counts.sharding == one.sharding("batch", "vocab")
    counts, bias = np.asarray(sampler.penalized.counts), np.asarray(sampler.rows.bias)
    assert (counts.dtype, bias.dtype) == (np.int32, np.float32)
    expected = np.zeros((2, 4, 8))
    expected[0][[1, 1, 3], [2, 3, 4]] = 2, 1, 1
    expected[1][3, [0, 5]] = 3, -2.5
    np.testing.assert_array_equal([counts, bias], expected)
    assert np.asarray(sampler.rows.frequency_penalty).tolist() == [0, 0.5, 0, 0]
    assert np.asarray(sampler.rows.presence_penalty).tolist() == [0, 0, 0, -1]


def test_a_bias_forces_and_forbids_in_its_row_alone():
    sequences = {
        0: sequence(0, logit_bias={4: 100}),
        1: sequence(1, logit_bias={1: -100, 2: -100}),
        2: sequence(2),
    }
    sampler = BatchSampler.of(sequences, 3, plan())
    assert greedy(sampler, sequences) == [4, 3, 1]


def test_a_penalty_and_what_is_suppressed_change_the_token_of_their_rows_alone():
    sequences = {
        0: sequence(0, prompt=[1], repetition_penalty=9.0),
        1: sequence(1, suppress_tokens=[1, 2]),
        2: sequence(2, prompt=[2]),
        3: sequence(3, suppress_tokens=range(VOCAB)),
    }
    sampler = BatchSampler.of(sequences, 4, plan())
    assert greedy(sampler, sequences) == [2, 3, 1, NO_TOKEN]


def test_what_a_constraint_forbids_depends_on_the_step():
    one = sequence(limit=3, eos=[1], min_new_tokens=1)
    sampler = BatchSampler.of({0: one}, 1, plan())
    assert greedy(sampler, {0: one}) == [2]
    one.append(2, None)
    assert greedy(sampler, {0: one}) == [1]
