# SPDX-License-Identifier: Apache-2.0
"""The sampler against float64 definitions, and against itself on every mesh."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from meshwen.engine.penalties import Penalized
from meshwen.engine.sampling import NO_TOKEN, SamplerRows, SamplingMethod, gumbel, sample
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError
from meshwen.ops.cpu.xla import XlaOnCpu
from meshwen.ops.operations import Ops
from meshwen.parallel.collectives import Collectives
from meshwen.parallel.mesh import make_mesh, model_axes

pytestmark = pytest.mark.usefixtures("unoptimised")
MESHES = ("1", "3", "2x4")  # One device; a vocabulary that does not divide; two axes.
every_mesh = pytest.mark.parametrize("mesh", MESHES)

# Written out: what Qwen2.5's Instruct checkpoints ship, its parts for other programs included.
QWEN_GENERATION_CONFIG = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "transformers_version": "4.37.0",
}


def params_of(**values) -> SamplingParams:
    return SamplingParams(**values)


# --- What may be asked for


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("temperature", "warm"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("top_k", 1 << 31),
        ("top_k", 2.5),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", "much"),
        ("logit_bias", 5),
        ("logit_bias", "5"),
        ("logit_bias", {5: 100.5}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", [(5, 1), (5, 2)]),
        ("logit_bias", [(5, 1, 2)]),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", {"five": 1}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {True: 1}),
        ("logit_bias", dict.fromkeys(range(1025), 1)),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", "5"),
        ("ignore_eos", 1),
        ("top_logprobs", -1),
        ("top_logprobs", 21),
        ("prompt_logprobs", 2),
        ("seed", -1),
        ("seed", 1 << 32),
        ("seed", 1.5),
        ("stop", ("fine", "")),
        ("stop", "a text"),
        ("stop", (7,)),
    ],
)
def test_an_impossible_value_is_named(name, value):
    with pytest.raises(MeshwenError, match=f"^{name} (of token 5 )?must ") as error:
        params_of(**{name: value})
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 1),
        ("temperature", 0),
        ("temperature", np.float32(2)),
        ("top_p", 1),
        ("top_p", 1e-9),
        ("top_k", (1 << 31) - 1),
        ("min_p", 1),
        ("repetition_penalty", 0.5),
        ("seed", (1 << 32) - 1),
        ("stop", ("\n\n", "END")),
        ("presence_penalty", -2),
        ("frequency_penalty", 2.0),
        ("logit_bias", ((0, -100), (7, 100.0))),
        ("stop_token_ids", (0, 5)),
    ],
)
def test_values_at_the_edge_are_taken(name, value):
    params = params_of(**{name: value})
    assert getattr(params, name) == value
    SamplerRows.of([params])  # Fits the arrays that the devices get.


@pytest.mark.parametrize(
    "given", [{7: 1, 5: np.float32(-2)}, {"7": 1, "5": -2.0}, [(5, -2), [7, 1]], ((7, 1), (5, -2))]
)
def test_biases_are_a_mapping_json_or_pairs(given):
    params = params_of(logit_bias=given)
    assert params.logit_bias == ((5, -2.0), (7, 1.0))
    assert hash(params) == hash(replace(params, logit_bias=params.logit_bias))


def test_likeliest_tokens_are_of_log_probabilities_that_are_asked_for():
    with pytest.raises(MeshwenError, match="top_logprobs 3 needs logprobs or prompt_logprobs"):
        params_of(top_logprobs=3)
    for given in ({"logprobs": True}, {"prompt_logprobs": True}):
        assert params_of(top_logprobs=3, **given).top_logprobs == 3


def test_a_checkpoint_gives_the_defaults():
    params = SamplingParams.from_generation_config(QWEN_GENERATION_CONFIG)
    assert params == params_of(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)


def test_without_a_generation_config_the_likeliest_token_is_taken():
    assert SamplingParams.from_generation_config({}) == SamplingParams()


def test_given_values_stand_in_the_checkpoints_place_and_none_is_not_given():
    given = {"temperature": None, "top_p": 0.5, "top_k": 0, "seed": None, "max_new_tokens": 7}
    params = SamplingParams.from_generation_config(QWEN_GENERATION_CONFIG, **given)
    assert params == params_of(
        temperature=0.7, top_p=0.5, top_k=0, repetition_penalty=1.05, max_new_tokens=7
    )


@pytest.mark.parametrize("zero", [0, 0.0])
def test_temperature_0_drops_the_repetition_penalty_that_is_not_given(zero):
    greedy = SamplingParams.from_generation_config(QWEN_GENERATION_CONFIG, temperature=zero)
    assert (greedy.temperature, greedy.repetition_penalty) == (0, 1)
    given = SamplingParams.from_generation_config(
        QWEN_GENERATION_CONFIG, temperature=zero, repetition_penalty=1.2
    )
    assert (given.temperature, given.repetition_penalty) == (0, 1.2)


@pytest.mark.parametrize("do_sample", [False, None])
def test_do_sample_false_is_greedy_with_the_checkpoints_penalty(do_sample):
    config = QWEN_GENERATION_CONFIG | {"do_sample": do_sample}
    params = SamplingParams.from_generation_config(config)
    assert (params.temperature, params.repetition_penalty) == (0, 1.05)
    assert SamplingParams.from_generation_config(config, temperature=0.3).temperature == 0.3


def test_do_sample_without_a_temperature_is_1():
    assert SamplingParams.from_generation_config({"do_sample": True}).temperature == 1
    nulls = {"do_sample": True, "temperature": None, "top_k": None}
    assert SamplingParams.from_generation_config(nulls) == params_of(temperature=1.0)


@pytest.mark.parametrize("given", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_who_asks_for_a_filter_asks_to_sample(given):
    greedy = QWEN_GENERATION_CONFIG | {"do_sample": False}
    assert SamplingParams.from_generation_config({}, **given) == params_of(temperature=1.0, **given)
    assert SamplingParams.from_generation_config(greedy, **given).temperature == 1
    assert SamplingParams.from_generation_config(greedy, temperature=0, **given).temperature == 0


def test_one_stop_string_is_one_string():
    for stop in ("END", ["END"], ("END",)):
        assert SamplingParams.from_generation_config({}, stop=stop).stop == ("END",)


def test_an_unknown_parameter_is_refused():
    with pytest.raises(MeshwenError, match="'heat'; there are max_new_tokens,"):
        SamplingParams.from_generation_config({}, heat=1)


def test_a_checkpoints_impossible_value_is_named():
    with pytest.raises(MeshwenError, match="top_p must be"):
        SamplingParams.from_generation_config({"do_sample": True, "top_p": 7})


# --- What a batch needs compiled

SAMPLED = params_of(temperature=1.0)


@pytest.mark.parametrize(
    ("batch", "candidates"),
    [
        ([params_of()], 1),
        ([SAMPLED], 0),
        ([replace(SAMPLED, top_k=1)], 1),
        ([replace(SAMPLED, top_k=20)], 32),
        ([replace(SAMPLED, top_k=32), params_of()], 32),
        ([replace(SAMPLED, top_k=20), replace(SAMPLED, top_k=40)], 100),
        ([replace(SAMPLED, top_k=90)], 100),
        ([replace(SAMPLED, top_k=10**6)], 100),
        ([replace(SAMPLED, top_p=0.9)], 100),
        ([replace(SAMPLED, top_p=0.9, top_k=3)], 8),
        ([replace(SAMPLED, min_p=0.1)], 100),
        ([SAMPLED, params_of()], 100),
        ([SAMPLED, replace(SAMPLED, top_k=3)], 100),
    ],
)
def test_the_method_offers_as_many_candidates_as_some_row_can_keep(batch, candidates):
    assert SamplingMethod.of(batch, 100) == SamplingMethod(candidates, False, False)


def test_top_ks_share_few_methods():
    found = {SamplingMethod.of([replace(SAMPLED, top_k=k)], 150_000) for k in range(2, 2049)}
    assert {method.candidates for method in found} == {8, 32, 128, 512, 2048}


def test_the_method_penalizes_and_gives_logprobs_when_some_row_wants_it():
    batch = [params_of(), params_of(repetition_penalty=1.1), params_of(logprobs=True)]
    assert SamplingMethod.of(batch, 100) == SamplingMethod(1, True, True)


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_a_penalty_by_counts_is_one(penalty):
    assert SamplingMethod.of([params_of(**{penalty: -0.5})], 100) == SamplingMethod(1, True, False)


def test_numbers_of_likeliest_tokens_share_few_methods():
    def method(top, vocab_size=100, logprobs=True):
        one = params_of(top_logprobs=top, logprobs=logprobs, prompt_logprobs=True)
        return SamplingMethod.of([one, params_of()], vocab_size).top_logprobs

    assert {top: method(top) for top in (0, 1, 5, 6, 20)} == {0: 0, 1: 5, 5: 5, 6: 20, 20: 20}
    assert method(6, vocab_size=8) == 8
    assert method(6, logprobs=False) == 0


# --- Drawing

ROWS = 4096


@functools.cache
def _compiled(mesh_text, vocab_size, method):
    mesh = make_mesh(mesh_text)
    axes = model_axes(mesh)
    split, whole = PartitionSpec(None, axes), PartitionSpec()

    def program(logits, rows, positions, seen):
        ops = Ops(Collectives(axes), backend=XlaOnCpu())
        return sample(logits, rows, positions, seen, vocab_size, method, ops)

    row_specs = SamplerRows.filled(whole, split)
    in_specs = (split, row_specs, whole, split)
    mapped = jax.shard_map(program, mesh=mesh, in_specs=in_specs, out_specs=whole, check_vma=False)
    return jax.jit(mapped), mesh.size


def sampled(
    logits, params, *, mesh="1", positions=None, seen=None, counts=None, forbidden=None, method=None
):
    """What is drawn from rows [B, V]; the padding is as likely as can be."""
    logits = np.asarray(logits, np.float32)
    batch, vocab_size = logits.shape
    method = method or SamplingMethod.of(params, vocab_size)
    program, devices = _compiled(mesh, vocab_size, method)
    padding = ((0, 0), (0, -vocab_size % devices))
    logits = np.pad(logits, padding, constant_values=1e9)
    penalized = None
    if method.penalize:
        tables = (np.zeros_like(logits[:, :vocab_size], bool) if seen is None else seen, counts)
        penalized = Penalized(*(None if one is None else np.pad(one, padding) for one in tables))
    positions = np.arange(batch) if positions is None else positions
    rows = SamplerRows.of(params)
    if forbidden is not None:
        rows = rows._replace(forbidden=np.pad(forbidden, padding))
    if any(one.logit_bias for one in params):
        bias = np.zeros_like(logits)
        for row, one in enumerate(params):
            bias[row, list(dict(one.logit_bias))] = list(dict(one.logit_bias).values())
        rows = rows._replace(bias=bias)
    found = program(logits, rows, np.asarray(positions, np.int32), penalized)
    return jax.tree.map(np.asarray, found)


def draw(logits, params, **given):
    """The tokens and log-probabilities of `sampled`."""
    return sampled(logits, params, **given)[:2]


def draw_many(logits, params, *, mesh="1", **tables):
    """`ROWS` tokens from one row of logits, each at its own position."""

    def repeated(row):
        return None if row is None else np.broadcast_to(row, (ROWS, len(logits)))

    tables = {name: repeated(table) for name, table in tables.items()}
    return draw(repeated(logits), [params] * ROWS, mesh=mesh, **tables)[0]


def distribution(logits, params, seen=(), counts=()) -> np.ndarray:
    """Probabilities after the filters, in the words of their papers: float64 [V]."""
    scores = [float(x) for x in logits]
    for token, bias in params.logit_bias:
        scores[token] += bias
    for token in seen:
        factor = params.repetition_penalty
        scores[token] *= factor if scores[token] < 0 else 1 / factor
    for token, count in enumerate(counts):  # mu[j] -> mu[j] - c[j] * alpha_frequency - ...
        scores[token] -= count * params.frequency_penalty
        scores[token] -= float(count > 0) * params.presence_penalty
    weights = {token: math.exp(score / params.temperature) for token, score in enumerate(scores)}
    ranked = sorted(weights, key=lambda token: -weights[token])
    if params.top_k:
        ranked = ranked[: params.top_k]
    total = sum(weights[token] for token in ranked)
    nucleus, reached = [], 0.0
    for token in ranked:
        if reached / total >= params.top_p:
            break
        nucleus.append(token)
        reached += weights[token]
    kept = [token for token in nucleus if weights[token] >= params.min_p * weights[ranked[0]]]
    probabilities = np.zeros(len(scores))
    probabilities[kept] = [weights[token] for token in kept]
    return probabilities / probabilities.sum()


def assert_drawn_from(tokens, probabilities):
    """The tokens drawn are those that can be, as often as they should (Pearson's chi-square)."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    likely = probabilities > 10 / len(tokens)
    assert not counts[probabilities == 0].any()
    assert counts[likely].all()
    expected = probabilities * len(tokens)
    rest = expected[~likely].sum()
    error = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    error += (counts[~likely].sum() - rest) ** 2 / rest if rest > 1 else 0
    freedom = likely.sum()
    # Wilson and Hilferty's normal approximation: 5 standard deviations.
    spread = 2 / (9 * freedom)
    assert (error / freedom) ** (1 / 3) < 1 - spread + 5 * math.sqrt(spread)


def some_logits(size, seed=0, scale=1.5) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


FILTERS = {
    "none": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 3.0},
    "top-k": {"top_k": 5},
    "top-k of a power of two": {"top_k": 8},
    "top-p": {"top_p": 0.7},
    "a narrow top-p": {"top_p": 0.01},
    "min-p": {"min_p": 0.2},
    "top-k and top-p": {"top_k": 6, "top_p": 0.8},
    "all": {"temperature": 1.7, "top_k": 9, "top_p": 0.85, "min_p": 0.3},
    "penalty": {"repetition_penalty": 1.6},
    "penalty and all": {
        "repetition_penalty": 0.6,
        "temperature": 0.8,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.05,
    },
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.6},
    "bias": {"logit_bias": {3: 2.5, 19: -100, 0: 1}},
    "bias, penalties and all": {
        "repetition_penalty": 1.4,
        "presence_penalty": -0.7,
        "frequency_penalty": 0.4,
        "logit_bias": {11: 3, 2: -1.5, 7: 0.5},
        "temperature": 0.8,
        "top_k": 9,
        "top_p": 0.9,
    },
}
SEEN = (0, 2, 3, 11, 17)
COUNTS = np.bincount([2, 11, 11, 17, 17, 17], minlength=20).astype(np.int32)
every_filter = pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)


@every_filter
def test_tokens_are_drawn_from_what_the_filters_keep(filters):
    params = params_of(**{"temperature": 1.0, "seed": 3} | filters)
    logits, seen = some_logits(20), np.isin(np.arange(20), SEEN)
    expected = distribution(logits, params, SEEN, COUNTS)
    assert_drawn_from(draw_many(logits, params, mesh="3", seen=seen, counts=COUNTS), expected)


def test_what_is_drawn_from_another_distribution_is_noticed():
    params = params_of(temperature=1.0)
    tokens = draw_many(some_logits(20), params)
    with pytest.raises(AssertionError):
        assert_drawn_from(tokens, distribution(some_logits(20), replace(params, temperature=1.15)))


@pytest.mark.torch
@every_filter
def test_the_reference_keeps_what_transformers_keeps(filters):
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    params = params_of(**{"temperature": 1.0} | filters)
    logits = some_logits(20)
    biases = {(token,): bias for token, bias in params.logit_bias}
    steps = [process.SequenceBiasLogitsProcessor(biases)] if biases else []
    steps += [
        process.RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
        process.TemperatureLogitsWarper(float(params.temperature)),
    ]
    steps += [process.TopKLogitsWarper(params.top_k)] if params.top_k else []
    steps += [process.TopPLogitsWarper(params.top_p), process.MinPLogitsWarper(params.min_p)]
    scores, seen = torch.tensor(logits[None], dtype=torch.float64), torch.tensor([SEEN])
    for step in steps:
        scores = step(seen, scores)
    theirs = torch.softmax(scores, dim=-1)[0].numpy()
    np.testing.assert_allclose(distribution(logits, params, SEEN), theirs, rtol=1e-6, atol=1e-12)


def test_a_token_far_below_the_others_is_never_drawn_by_noise_alone():
    # A vocabulary of Qwen2.5's size draws this many numbers in 128 steps.
    rows, size = 128, 1 << 17
    logits = np.full((rows, size), -200, np.float32)
    logits[:, 7] = 0
    tokens, _ = draw(logits, [params_of(temperature=1.0)] * rows)
    assert set(tokens) == {7}


def test_the_tail_of_a_large_vocabulary_is_drawn_as_often_as_it_should():
    # Each of 65536 tokens has a probability of 2**-17, all of them together one half.
    size = 1 << 16
    logits = np.zeros(size, np.float32)
    logits[5] = math.log(size - 1)
    params, rows = params_of(temperature=1.0), 512
    tokens, _ = draw(np.broadcast_to(logits, (rows, size)), [params] * rows)
    assert abs((tokens == 5).sum() - rows / 2) < 5 * math.sqrt(rows / 4)


def test_draws_of_different_seeds_and_positions_are_independent():
    logits, size = np.zeros((ROWS, 4)), 4
    by_seed, _ = draw(
        logits, [replace(SAMPLED, seed=i) for i in range(ROWS)], positions=np.zeros(ROWS)
    )
    by_position, _ = draw(logits, [SAMPLED] * ROWS)
    for tokens in (by_seed, by_position):
        pairs = size * tokens[:-1] + tokens[1:]
        assert_drawn_from(tokens, np.full(size, 1 / size))
        assert_drawn_from(pairs, np.full(size**2, 1 / size**2))
    assert_drawn_from(size * by_seed + by_position, np.full(size**2, 1 / size**2))


# --- The same on every mesh, in every batch, by every method

STEPS, VOCAB = 8, 101
MIXED = [
    params_of(),
    replace(SAMPLED, seed=1),
    replace(SAMPLED, seed=2, top_k=5),
    replace(SAMPLED, seed=3, top_p=0.8),
    replace(SAMPLED, seed=4, min_p=0.1, temperature=1.3),
    params_of(repetition_penalty=1.5),
    replace(SAMPLED, seed=5, top_k=7, top_p=0.9, repetition_penalty=1.3),
    params_of(presence_penalty=1.1, frequency_penalty=0.3, logit_bias={3: 1.5, 100: -2}),
    replace(SAMPLED, seed=6, top_k=6, frequency_penalty=-0.7, repetition_penalty=1.2),
    replace(SAMPLED, seed=7, logit_bias={VOCAB - 1: 2, 5: 3}),
]


def mixed_batch():
    """Each of `MIXED` at several positions, with logits and earlier tokens of its own."""
    params = MIXED * STEPS
    rng = np.random.default_rng(1)
    logits = some_logits((len(params), VOCAB), seed=2, scale=2)
    tables = {
        "positions": np.repeat(np.arange(STEPS) * 37, len(MIXED)),
        "seen": rng.random((len(params), VOCAB)) < 0.3,
        "counts": rng.poisson(0.4, (len(params), VOCAB)).astype(np.int32),
    }
    return logits, params, tables


@functools.cache
def mixed_on_one_device():
    logits, params, tables = mixed_batch()
    return draw(logits, params, **tables)[0]


@pytest.mark.parametrize("mesh", ["3", "1x8", "2x4", "data=2,model=4"])
def test_seeded_draws_are_the_same_on_every_mesh(mesh):
    logits, params, tables = mixed_batch()
    found, _ = draw(logits, params, mesh=mesh, **tables)
    np.testing.assert_array_equal(found, mixed_on_one_device())


@pytest.mark.parametrize("request_number", range(len(MIXED)))
def test_a_request_draws_the_same_alone_and_by_its_own_method(request_number):
    logits, params, tables = mixed_batch()
    rows = slice(request_number, None, len(MIXED))
    mine = {name: table[rows] for name, table in tables.items()}
    method = SamplingMethod.of(params[rows], VOCAB)
    assert method != SamplingMethod.of(params, VOCAB)
    found, _ = draw(logits[rows], params[rows], mesh="2x4", **mine)
    np.testing.assert_array_equal(found, mixed_on_one_device()[rows])


def test_the_row_does_not_matter():
    logits, params, tables = mixed_batch()
    order = np.random.default_rng(3).permutation(len(params))
    tables = {name: table[order] for name, table in tables.items()}
    found, _ = draw(logits[order], [params[i] for i in order], **tables)
    np.testing.assert_array_equal(found, mixed_on_one_device()[order])


@pytest.mark.parametrize("candidates", [16, VOCAB])
def test_the_number_of_candidates_does_not_matter(candidates):
    params = [replace(SAMPLED, seed=seed, top_k=5, top_p=0.9) for seed in range(64)]
    logits = some_logits((64, VOCAB))
    found, _ = draw(logits, params, mesh="3", method=SamplingMethod(candidates, False, False))
    by_definition = [
        np.flatnonzero(distribution(row, p)) for row, p in zip(logits, params, strict=True)
    ]
    assert all(token in kept for token, kept in zip(found, by_definition, strict=True))
    np.testing.assert_array_equal(found, draw(logits, params)[0])


# --- Greedy


@pytest.mark.parametrize(("mesh", "others"), [*((mesh, []) for mesh in MESHES), ("3", [SAMPLED])])
def test_equally_likely_tokens_give_the_lowest_id(mesh, others):
    logits = np.full((12, 37), -1.0)
    rng = np.random.default_rng(4)
    for row in range(len(logits) - 1):  # The last is all equal.
        logits[row, rng.choice(37, rng.integers(1, 12), replace=False)] = 2.5
    params = [params_of()] * len(logits) + others
    rows = np.concatenate([logits, np.zeros((len(others), 37))])
    found, _ = draw(rows, params, mesh=mesh)
    assert found[: len(logits)].tolist() == [row.tolist().index(row.max()) for row in logits]


@pytest.mark.parametrize("mesh", ["1", "1x8"])
@pytest.mark.parametrize("candidates", [0, 16, 37])
def test_equal_scores_give_the_lowest_id_by_every_method(monkeypatch, mesh, candidates):
    def noise(seed, positions, ids, tp):
        return jnp.where(ids == 5, 1.0, 0.0)  # Makes token 5 as good as 9, the likeliest.

    monkeypatch.setattr("meshwen.engine.sampling._noise", noise)
    logits = np.full((1, 37), -1.0)
    logits[0, [5, 9]] = 1.0, 2.0
    params, method = [params_of(temperature=1.0)], SamplingMethod(candidates, False, False)
    _compiled.cache_clear()
    assert draw(logits, params, mesh=mesh, method=method)[0].tolist() == [5]
    _compiled.cache_clear()


@pytest.mark.parametrize("candidates", [0, 16, 37])
def test_noise_of_minus_infinity_brings_back_nothing_that_may_not_come(monkeypatch, candidates):
    def noise(seed, positions, ids, tp):
        return jnp.full((1, ids.shape[1]), -jnp.inf)

    monkeypatch.setattr("meshwen.engine.sampling._noise", noise)
    params, method = [params_of(temperature=1.0)], SamplingMethod(candidates, False, False)
    _compiled.cache_clear()
    forbidden = np.arange(37)[None] != 9
    assert draw(np.zeros((1, 37)), params, forbidden=forbidden, method=method)[0].tolist() == [9]
    _compiled.cache_clear()


@pytest.mark.parametrize("mesh", ["1", "1x8"])
def test_top_k_keeps_the_lowest_ids_of_equally_likely_tokens(mesh):
    params = [replace(SAMPLED, top_k=3, seed=seed) for seed in range(200)]
    found, _ = draw(np.zeros((200, 37)), params, mesh=mesh)
    assert set(found) == {0, 1, 2}


@pytest.mark.parametrize(
    ("mesh", "params"),
    [("3", params_of()), ("2x4", SAMPLED), ("3", replace(SAMPLED, top_p=0.99))],
    ids=["greedy", "whole", "top-p"],
)
def test_padding_of_the_vocabulary_is_never_drawn(mesh, params):
    batch = [replace(params, seed=seed, logprobs=True) for seed in range(200)]
    found, logprobs = draw(np.full((200, 37), -50.0), batch, mesh=mesh)
    assert found.max() < 37
    np.testing.assert_allclose(logprobs, -math.log(37), rtol=1e-6)


BY_METHOD = {0: {}, 16: {"top_k": 9}, 37: {"top_p": 0.9}}
every_method = pytest.mark.parametrize("filters", BY_METHOD.values(), ids=BY_METHOD)


@every_method
@pytest.mark.parametrize("mesh", ["1", "3"])
def test_extreme_temperatures_overflow_nowhere(mesh, filters):
    cold, hot = (5e-324, 1e-46, 1e-39, 1e-38, 1e-30, 1e-9), (1e30, 1e39, 1e308)
    logits = np.tile(some_logits(37, scale=20), (9, 1))
    logits[4] -= 100  # All below zero.
    params = [params_of(temperature=t, seed=2, **filters) for t in (*cold, *hot)]
    found = draw(logits, params, mesh=mesh)[0]
    assert (found[: len(cold)] == logits[0].argmax()).all()
    as_hot = [replace(one, temperature=1e15) for one in params]
    assert (found[len(cold) :] == draw(logits, as_hot, mesh=mesh)[0][len(cold) :]).all()


def test_extreme_penalties_overflow_nowhere():
    logits = np.tile(np.float32([3, 2, 0, -1, -2]), (4, 1))
    seen = np.tile([True, False, True, True, False], (4, 1))
    penalties = (1e-300, 1e-40, 1e40, 1e300)
    tokens, _ = draw(logits, [params_of(repetition_penalty=p) for p in penalties], seen=seen)
    assert tokens.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("mesh", ["1", "3"])
@pytest.mark.parametrize("filters", [{"temperature": 0}, *BY_METHOD.values()])
def test_logits_that_are_not_finite_give_no_token_to_their_own_row_alone(mesh, filters):
    params = [params_of(**({"temperature": 0.8, "seed": 5} | filters))] * 12
    good = np.stack([some_logits(37, seed) for seed in range(12)])
    bad = good.copy()
    for row, value in ((1, np.nan), (2, np.inf), (3, -np.inf), (5, np.nan), (6, np.inf)):
        bad[row, 6 * row] = value
    bad[8] = np.nan
    tokens, expected = (draw(logits, params, mesh=mesh)[0] for logits in (bad, good))
    broken = [1, 2, 3, 5, 6, 8]
    assert (tokens[broken] == NO_TOKEN).all()
    assert (np.delete(tokens, broken) == np.delete(expected, broken)).all()
    # What may not come is no less wrong.
    forbidden = np.isnan(bad)
    assert (draw(bad, params, mesh=mesh, forbidden=forbidden)[0][broken] == NO_TOKEN).all()


@pytest.mark.parametrize(
    ("mesh", "filters"), [("1", {"temperature": 0}), ("3", {}), ("1", FILTERS["penalty and all"])]
)
def test_forbidden_tokens_are_never_drawn_and_the_others_as_without_them(mesh, filters):
    params = params_of(**{"temperature": 1.0, "seed": 3} | filters)
    logits, seen = some_logits(20), np.isin(np.arange(20), SEEN)
    forbidden = np.isin(np.arange(20), [int(logits.argmax()), 2, 7, 19])
    found = draw_many(logits, params, mesh=mesh, seen=seen, forbidden=forbidden)
    left = np.where(forbidden, -1e9, logits)
    if params.temperature == 0:
        assert (found == left.argmax()).all()
    else:
        assert_drawn_from(found, distribution(left, params, SEEN))
    nothing = np.ones_like(forbidden)
    nothing_left = draw_many(logits, params, mesh=mesh, seen=seen, forbidden=nothing)
    assert (nothing_left == NO_TOKEN).all()


def test_a_penalty_pushes_both_signs_down():
    logits = [[2.0, 1.9, -1.0, -1.1], [-1.0, -1.1, -9.0, -9.0]]
    seen = np.array([[True, False, False, False]] * 2)
    params = [params_of(repetition_penalty=1.5)] * 2
    assert draw(logits, params, seen=seen)[0].tolist() == [1, 1]


# --- Log-probabilities


@every_mesh
def test_logprobs_are_of_the_unmodified_logits(mesh):
    size = 5001
    logits = some_logits((8, size), scale=8)
    params = [replace(SAMPLED, seed=i, top_k=20, temperature=2.0, logprobs=True) for i in range(6)]
    params += [params_of(logprobs=True, repetition_penalty=3.0)] * 2
    seen = np.random.default_rng(0).random((8, size)) < 0.9
    tokens, found = draw(logits, params, mesh=mesh, seen=seen)
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, exact[np.arange(8), tokens], rtol=0, atol=1e-5)
    assert found.dtype == np.float32


@pytest.mark.parametrize(("mesh", "size"), [("1", 37), ("3", 37), ("2x4", 22)])
def test_the_likeliest_tokens_are_those_of_the_unmodified_logits(mesh, size):
    logits = np.round(some_logits((6, size)), 1)  # Some are equal.
    assert min(map(len, map(set, logits.tolist()))) < size
    bias = {int(logits[0].argmax()): -100}
    params = [replace(SAMPLED, seed=i, logprobs=True, top_logprobs=7) for i in range(5)]
    params.append(params_of(logprobs=True, logit_bias=bias))
    found = sampled(logits, params, mesh=mesh)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    order = np.stack([sorted(range(size), key=lambda i: (-row[i], i)) for row in logits])[:, :20]
    np.testing.assert_array_equal(found.top_ids, order)
    expected = np.take_along_axis(exact, order, axis=1)
    np.testing.assert_allclose(found.top_logprobs, expected, rtol=0, atol=1e-5)


def test_there_are_no_logprobs_unless_asked_for():
    assert draw(np.zeros((1, 8)), [params_of()])[1] is None


# --- Noise


def test_noise_is_that_of_float64():
    bits = np.concatenate([np.arange(1 << 12), 2.0 ** np.arange(12, 31.5, 0.01), [2**32 - 256]])
    uniform = np.float32((bits + 0.5) * 2.0**-32)
    exact = uniform.astype(np.float64)
    np.testing.assert_allclose(
        jax.jit(gumbel)(uniform), -np.log(-np.log1p(-exact)), rtol=3e-7, atol=3e-7
    )
