# SPDX-License-Identifier: Apache-2.0
"""Tokens that may not come: against their definitions, transformers' processors, and in answers."""

import functools

import numpy as np
import pytest

import reference
from mesh_model import MeshModel
from meshwen.engine.constraints import TokenConstraints
from meshwen.engine.engine import Engine
from meshwen.engine.options import EngineOptions
from meshwen.engine.prompt_lookup import PromptLookup
from meshwen.engine.request import Request
from meshwen.engine.sampling_params import SamplingParams
from meshwen.engine.speculation import Speculation
from meshwen.errors import MeshwenError
from tiny_model import STEPS, TINY, greedy, weights

pytestmark = pytest.mark.usefixtures("unoptimised")
SPLIT = "data=2,model=4"
V = 12


def forbidden(prompt, answer, limit=10, eos=(0,), **asked) -> list[int]:
    """What may not follow, of a vocabulary of V."""
    request = Request(tuple(prompt), SamplingParams(**asked))
    constraints = TokenConstraints.of(request, limit, frozenset(eos), V)
    for token in answer:
        constraints.push(token)
    row = np.zeros(V + 3, bool)
    constraints.forbid(row)
    return [*map(int, np.flatnonzero(row[:V]))]


ALL_BUT = [[*range(n), *range(n + 1, V)] for n in range(V)]


@pytest.mark.parametrize(
    ("prompt", "answer", "asked", "expected"),
    [
        ([5], [6], {"suppress_tokens": (3, 7, 10**6)}, [3, 7]),
        ([5], [], {"begin_suppress_tokens": (3,)}, [3]),
        ([5], [6], {"begin_suppress_tokens": (3,)}, []),
        ([5], [6], {"min_new_tokens": 2}, [0]),
        ([5], [6, 6], {"min_new_tokens": 2}, []),
        ([5], [6], {"min_new_tokens": 2, "stop_token_ids": (7, 3)}, [0, 3, 7]),
        ([5], [6, 6], {"min_new_tokens": 2, "stop_token_ids": (7, 3)}, []),
        ([5, 5], [6], {"min_length": 4, "stop_token_ids": (7,)}, [0, 7]),
        ([5, 5], [6], {"min_length": 4}, [0]),
        ([5, 5], [6, 6], {"min_length": 4}, []),
        ([5, 6], [7], {"bad_words_ids": ((6, 7, 2), (7, 3), (4,), (0,), (5, 7, 9))}, [2, 3, 4]),
        ([7], [], {"bad_words_ids": ((6, 7, 2),)}, []),
        ([1, 2, 3, 1], [2], {"no_repeat_ngram_size": 3}, [3]),
        ([1, 2], [3, 1, 2], {"no_repeat_ngram_size": 3}, [3]),
        ([1, 2, 3], [4], {"no_repeat_ngram_size": 1}, [1, 2, 3, 4]),
        ([1, 1], [], {"no_repeat_ngram_size": 2}, [1]),
        ([1], [], {"no_repeat_ngram_size": 3}, []),
        ([1, 2, 3], [4, 1, 2], {"encoder_no_repeat_ngram_size": 3}, [3]),
        ([4], [1, 2, 3, 1, 2], {"encoder_no_repeat_ngram_size": 3}, []),
        ([5], [], {"forced_bos_token_id": 3}, ALL_BUT[3]),
        ([5, 5], [], {"forced_bos_token_id": 3, "min_new_tokens": 1}, [0]),
        ([5], [], {"forced_bos_token_id": 3, "begin_suppress_tokens": (3,)}, ALL_BUT[3]),
        ([5], [3], {"forced_bos_token_id": 3, "begin_suppress_tokens": (4,)}, [4]),
        ([5], [1] * 9, {"forced_eos_token_id": (8, 4), "min_new_tokens": 20}, ALL_BUT[4]),
        ([5], [1] * 8, {"forced_eos_token_id": (8, 4)}, []),
        ([5], [1] * 9, {"forced_eos_token_id": 8, "suppress_tokens": (8,)}, [*range(V)]),
    ],
)
def test_what_may_not_come_next(prompt, answer, asked, expected):
    assert forbidden(prompt, answer, **asked) == expected


def test_of_several_forced_tokens_one_is_drawn():
    asked = {"forced_eos_token_id": (8, 4), "temperature": 1.0}
    assert forbidden([5], [1] * 9, **asked) == [n for n in range(V) if n not in (4, 8)]


@pytest.mark.torch
def test_transformers_forbids_the_same():
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(0)
    for _ in range(300):
        prompt, answer = (rng.integers(0, 5, rng.integers(low, 6)).tolist() for low in (1, 0))
        words = [rng.integers(0, 5, rng.integers(1, 4)).tolist() for _ in range(3)]
        n, m, least, whole = (int(rng.integers(1, 5)) for _ in range(4))
        some = [rng.integers(0, V, 2).tolist() for _ in range(3)]
        limit, bos = int(rng.integers(1, 8)), int(rng.integers(0, V))
        ids, prompts = torch.tensor([[*prompt, *answer]]), torch.tensor([prompt])
        begin = len(prompt) + (len(prompt) == 1)
        steps = [  # In the order of transformers' `_get_logits_processor`.
            process.NoRepeatNGramLogitsProcessor(n),
            process.EncoderNoRepeatNGramLogitsProcessor(m, prompts),
            process.NoBadWordsLogitsProcessor(words, [0]),
            process.MinLengthLogitsProcessor(whole, [0]),
            process.MinNewTokensLengthLogitsProcessor(len(prompt), least, [0]),
            process.ForcedBOSTokenLogitsProcessor(bos),
            process.ForcedEOSTokenLogitsProcessor(len(prompt) + limit, some[0]),
            process.SuppressTokensLogitsProcessor(some[1]),
            process.SuppressTokensAtBeginLogitsProcessor(some[2], begin),
        ]
        scores = torch.randn(1, V)
        for step in steps:
            scores = step(ids, scores)
        found = forbidden(
            prompt,
            answer,
            limit,
            no_repeat_ngram_size=n,
            encoder_no_repeat_ngram_size=m,
            bad_words_ids=words,
            min_length=whole,
            min_new_tokens=least,
            forced_bos_token_id=bos,
            forced_eos_token_id=some[0],
            suppress_tokens=some[1],
            begin_suppress_tokens=some[2],
            temperature=1.0,
        )
        assert found == torch.isinf(scores[0]).nonzero()[:, 0].tolist()


# --- In answers

PROMPTS = ((3, 1, 4, 1, 5), (9,))
FIRST = greedy(PROMPTS[0])[0]
ASKED = [
    {},
    {"suppress_tokens": FIRST[:2]},
    {"begin_suppress_tokens": FIRST[:1], "encoder_repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 1, "repetition_penalty": 1.3},
    {"forced_eos_token_id": (7,), "min_new_tokens": 3},
    {"presence_penalty": -2, "frequency_penalty": 2, "ignore_eos": True},
    {"presence_penalty": 2, "frequency_penalty": -1.5, "repetition_penalty": 0.9},
    {"presence_penalty": -2, "logit_bias": {FIRST[0]: -100, 9: 2.5}},
    {"logit_bias": {FIRST[1]: -3, FIRST[2]: 7}, "ignore_eos": True},
    {"stop_token_ids": FIRST[2:], "min_new_tokens": 4, "ignore_eos": True},
]


@functools.cache
def runner(mesh):
    return MeshModel(TINY, mesh).runner


def engine(mesh, eos=(), drafts=0):
    budget = EngineOptions().cache_plan(runner(mesh).model)
    return Engine(runner(mesh), None, eos, budget, speculation=Speculation(PromptLookup(), drafts))


def answered(prompt, eos=(), **asked) -> tuple[int, ...]:
    """The greedy answer in float64, one token after the other."""
    params = SamplingParams(max_new_tokens=STEPS, **asked)
    eos = () if params.ignore_eos else eos
    constraints = TokenConstraints(Request(prompt, params), STEPS, frozenset(eos), TINY.vocab_size)
    tokens = list(prompt)
    while len(tokens) < len(prompt) + STEPS:
        scores = reference.logits(weights(), TINY, tokens)[-1].copy()
        for token, bias in params.logit_bias:
            scores[token] += bias
        for seen, penalty in (
            (prompt, 1 / params.encoder_repetition_penalty),
            (tokens, params.repetition_penalty),
        ):
            for token in set(seen):
                scores[token] *= penalty if scores[token] < 0 else 1 / penalty
        for token in tokens[len(prompt) :]:
            scores[token] -= params.frequency_penalty
        for token in set(tokens[len(prompt) :]):
            scores[token] -= params.presence_penalty
        row = np.zeros(TINY.vocab_size, bool)
        constraints.forbid(row)
        token = int(np.where(row, -np.inf, scores).argmax())
        constraints.push(token)
        tokens.append(token)
        if token in (*eos, *params.stop_token_ids):
            break
    return tuple(tokens[len(prompt) :])


@pytest.mark.parametrize(("mesh", "drafts"), [("1", 0), (SPLIT, 3)])
def test_answers_keep_to_what_each_request_asks_for(mesh, drafts):
    eos = (FIRST[1],)
    requests = [
        Request(prompt, SamplingParams(max_new_tokens=STEPS, **asked))
        for prompt in PROMPTS
        for asked in ASKED
    ]
    done = {
        e.request: e.completion for e in engine(mesh, eos, drafts).run(requests) if e.completion
    }
    for number, request in enumerate(requests):
        asked = ASKED[number % len(ASKED)]
        assert done[number].tokens == answered(request.prompt_tokens, eos, **asked), asked


def test_each_token_of_an_answer_is_counted_once_while_its_batch_stays_the_same():
    asked = {"presence_penalty": -2, "frequency_penalty": 2}
    other = {"presence_penalty": 2, "frequency_penalty": -1.5}
    pairs = [(PROMPTS[0], asked), (PROMPTS[1], asked), (PROMPTS[1], other)]
    requests = [
        Request(prompt, SamplingParams(max_new_tokens=STEPS, **one)) for prompt, one in pairs
    ]
    done = {e.request: e.completion for e in engine("1").run(requests) if e.completion}
    for number, (prompt, one) in enumerate(pairs):
        assert done[number].tokens == answered(prompt, **one)


def test_drafts_rest_where_each_would_need_constraints_of_its_own(monkeypatch):
    step, found = runner("1").step, set()

    def watched(cache, inputs, *rest):
        found.add(inputs.sampler_rows is not None)
        return step(cache, inputs, *rest)

    monkeypatch.setattr(runner("1"), "step", watched)
    monkeypatch.setattr(
        "meshwen.engine.prompt_lookup.SequenceLookup.drafts", lambda _, count: [0] * count
    )
    prompt = (1, 2, 3) * 3
    asked = (
        ({}, True),
        ({"encoder_repetition_penalty": 1.1, "logit_bias": {5: 1}}, True),
        ({"suppress_tokens": (5,)}, False),
        ({"presence_penalty": 0.1}, False),
    )
    for one, expected in asked:
        found.clear()
        params = SamplingParams(max_new_tokens=STEPS, **one)
        (*_, last) = engine("1", drafts=3).run([Request(prompt, params)])
        assert last.completion.tokens == answered(prompt, **one)
        assert (True in found) == expected


def test_a_request_that_forbids_everything_is_an_error_of_its_own():
    nothing = Request(PROMPTS[0], SamplingParams(suppress_tokens=range(TINY.vocab_size)))
    other = Request(PROMPTS[0], SamplingParams(max_new_tokens=STEPS))
    events = engine("1").run([nothing, other])
    done = {e.request: e.completion for e in events if e.completion}
    assert done[0].error == "the sampling parameters let nothing come as token 1 of the answer"
    assert done[1].tokens == FIRST


def test_a_length_counts_the_prompt():
    (found,) = [
        event.completion
        for event in engine("1").run([Request(PROMPTS[0], SamplingParams(max_length=8))])
        if event.completion
    ]
    assert (found.tokens, found.finish_reason) == (FIRST[:3], "length")
    with pytest.raises(MeshwenError, match="prompt 1 has 5 tokens, but max_length is 5"):
        engine("1").run([Request(PROMPTS[0], SamplingParams(max_length=5))])


def test_a_forced_token_outside_the_vocabulary_is_refused():
    for name, value in (("forced_bos_token_id", 263), ("forced_eos_token_id", (1, 263))):
        with pytest.raises(MeshwenError, match=f"{name} 263 is outside the vocabulary of 263"):
            engine("1").run([Request(PROMPTS[0], SamplingParams(**{name: value}))])
