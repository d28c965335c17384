# SPDX-License-Identifier: Apache-2.0
"""Requests in, tokens out: against greedy decoding in float64, and against themselves alone."""

import functools
import itertools
import logging
import re
from dataclasses import replace
from math import ceil

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from mesh_model import MeshModel, random_tokens, with_nan
from meshwen import Qwen2ForCausalLM
from meshwen.engine.answer_text import StopText
from meshwen.engine.engine import Engine
from meshwen.engine.options import EngineOptions
from meshwen.engine.penalties import Penalized
from meshwen.engine.request import Completion, Request
from meshwen.engine.sampling import SamplerRows, SamplingMethod
from meshwen.engine.sampling_params import SamplingParams
from meshwen.engine.step_inputs import RowTokens, StepInputs, in_parts, step_inputs, tables_in_order
from meshwen.errors import MeshwenError
from meshwen.ops.backend import Backend
from needs_kernels import needs_kernels
from speller import ANSWER, answer_ids, write_speller
from tiny_model import ONE_LAYER, STEPS, TINY, greedy, weights

SPLIT = "data=2,model=4"
PROMPTS = [random_tokens(TINY, 1, n, seed=n)[0].tolist() for n in (5, 1, 17, 30)]
BLOCK = Backend.block_size

pytestmark = pytest.mark.usefixtures("unoptimised")
every_mesh = pytest.mark.parametrize("mesh", ["1", SPLIT])


@functools.cache
def model(mesh="1", config=TINY) -> MeshModel:
    return MeshModel(config, mesh)


def engine(mesh="1", eos=(), max_num_seqs=4, config=TINY) -> Engine:
    return engine_of(model(mesh, config).runner, eos, max_num_seqs)


def engine_of(runner, eos=(), max_num_seqs=4, **options) -> Engine:
    plan = EngineOptions(max_num_seqs=max_num_seqs).cache_plan(runner.model)
    return Engine(runner, None, eos, plan, **options)


def request(prompt, **sampling) -> Request:
    return Request(tuple(prompt), SamplingParams(**{"max_new_tokens": STEPS} | sampling))


def completions(events) -> list[Completion]:
    done = {event.request: event.completion for event in events if event.completion}
    return [done[number] for number in range(len(done))]


# --- The right tokens


@pytest.mark.parametrize(("mesh", "count"), [("1", 4), (SPLIT, 3)])
def test_a_batch_of_mixed_lengths_gives_each_prompts_own_tokens(mesh, count):
    requests = [request(prompt, logprobs=True) for prompt in PROMPTS[:count]]
    found = completions(engine(mesh).run(requests))
    assert len(found) == count
    for completion, prompt in zip(found, PROMPTS, strict=False):
        tokens, logprobs = greedy(tuple(prompt))
        assert completion.prompt_tokens == tuple(prompt)
        assert completion.tokens == tokens
        assert completion.finish_reason == "length"
        np.testing.assert_allclose(completion.logprobs, logprobs, rtol=0, atol=1e-4)


# Sampling from all tokens, and from the top k; `test_sampling.py` has the rest.
SAMPLED = [
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "top_k": 20, "seed": 2, "repetition_penalty": 1.3},
]


@functools.cache
def alone(number: int) -> tuple[int, ...]:
    (completion,) = completions(engine().run([request(PROMPTS[number], **SAMPLED[number])]))
    return completion.tokens


@every_mesh
def test_sampled_requests_do_not_depend_on_their_batch(mesh):
    requests = [request(p, **s) for p, s in zip(PROMPTS, SAMPLED, strict=False)]
    found = [c.tokens for c in completions(engine(mesh).run(requests))]
    assert found == [alone(number) for number in range(len(SAMPLED))]


def test_an_interrupted_answer_goes_on_as_it_would_have():
    prompt, sampling = PROMPTS[0], SAMPLED[0]
    begun = alone(0)[:3]
    rest = STEPS - len(begun)
    (found,) = completions(
        engine().run([request([*prompt, *begun], **sampling, max_new_tokens=rest)])
    )
    assert found.tokens == alone(0)[3:]


def test_a_repetition_penalty_sees_prompt_and_answer():
    prompt = tuple(PROMPTS[0])
    prompt += greedy(prompt)[0][:-1]
    assert greedy(prompt)[0][0] in prompt
    (found,) = completions(engine().run([request(prompt, repetition_penalty=2.0)]))
    expected = list(prompt)
    for _ in range(STEPS):
        scores = reference.logits(weights(), TINY, expected)[-1]
        for token in set(expected):
            scores[token] = scores[token] / 2 if scores[token] > 0 else scores[token] * 2
        expected.append(int(np.argmax(scores)))
    assert found.tokens == tuple(expected[len(prompt) :])
    assert found.tokens[0] != greedy(prompt)[0][0]


def test_logprobs_come_only_to_those_who_asked():
    events = list(engine().run([request(PROMPTS[0], logprobs=True), request(PROMPTS[1])]))
    first, second = completions(events)
    assert second.logprobs is None
    assert first.logprobs == tuple(e.logprob for e in events if e.request == 0)
    assert {e.logprob for e in events if e.request == 1} == {None}
    np.testing.assert_allclose(first.logprobs, greedy(tuple(PROMPTS[0]))[1], rtol=0, atol=1e-4)


@every_mesh
def test_the_likeliest_tokens_of_each_step_are_those_of_float64(mesh):
    asked = [{"logprobs": True, "top_logprobs": 7}, {"logprobs": True}, {}]
    requests = [request(prompt, **one) for prompt, one in zip(PROMPTS, asked, strict=False)]
    events = list(engine(mesh).run(requests))
    (found, *others) = completions(events)
    assert {one.top_logprobs for one in others} == {None}
    assert found.top_logprobs == tuple(e.top_logprobs for e in events if e.request == 0)
    tokens = list(PROMPTS[0])
    for token, top in zip(found.tokens, found.top_logprobs, strict=True):
        scores = reference.logits(weights(), TINY, tokens)[-1]
        scores = scores - np.log(np.exp(scores).sum())
        order = np.argsort(-scores)[:7].tolist()
        assert [one for one, _ in top] == order
        np.testing.assert_allclose([x for _, x in top], scores[order], rtol=0, atol=1e-4)
        assert (token, found.logprobs[len(tokens) - len(PROMPTS[0])]) == top[0]
        tokens.append(token)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"stop_token_ids": (5, 263)}, "stop_token_ids 263 is outside the vocabulary of 263"),
        ({"logit_bias": {1: 1, 10**12: 1}}, "logit_bias 1000000000000 is outside the vocabulary"),
    ],
)
def test_a_token_outside_the_vocabulary_is_refused(sampling, message):
    with pytest.raises(MeshwenError, match=message):
        engine().run([request(PROMPTS[0], **sampling)])


def test_more_requests_than_fit_at_once_come_back_in_order():
    prompts = [random_tokens(TINY, 1, n, seed=n)[0].tolist() for n in (5, 1, 7, 3, 2)]
    events = list(engine(max_num_seqs=2).run([request(prompt) for prompt in prompts]))
    assert [c.tokens for c in completions(events)] == [greedy(tuple(p))[0] for p in prompts]
    for number in range(len(prompts)):
        of_one = [event for event in events if event.request == number]
        assert [event.completion is None for event in of_one] == [True] * (STEPS - 1) + [False]
        assert tuple(event.token for event in of_one) == of_one[-1].completion.tokens


def test_no_requests_give_nothing():
    assert list(engine().run([])) == []


# --- The right end


def test_each_request_ends_at_its_own_limit_and_disturbs_no_other():
    limits = [1, STEPS, 3, 2]
    requests = [request(p, max_new_tokens=n) for p, n in zip(PROMPTS, limits, strict=True)]
    found = completions(engine().run(requests))
    assert [c.tokens for c in found] == [
        greedy(tuple(p))[0][:n] for p, n in zip(PROMPTS, limits, strict=True)
    ]
    assert {c.finish_reason for c in found} == {"length"}


def test_an_answer_goes_on_beyond_the_end_of_a_kv_block():
    # A prompt that ends with a block, and answers that end with it, before it and beyond.
    lengths = [BLOCK, BLOCK - STEPS + 1, BLOCK - STEPS, BLOCK - 3]
    prompts = [random_tokens(TINY, 1, n, seed=n)[0].tolist() for n in lengths]
    found = completions(engine().run([request(prompt) for prompt in prompts]))
    assert [c.tokens for c in found] == [greedy(tuple(p))[0] for p in prompts]


def test_an_end_of_text_token_ends_its_own_request():
    expected = [greedy(tuple(prompt))[0] for prompt in PROMPTS]
    eos = {expected[0][2], expected[2][1]}
    found = completions(engine(eos=eos).run([request(prompt) for prompt in PROMPTS]))
    for completion, tokens in zip(found, expected, strict=True):
        ends = [n for n, token in enumerate(tokens, start=1) if token in eos]
        assert completion.tokens == tokens[: ends[0] if ends else STEPS]
        assert completion.finish_reason == ("stop" if ends else "length")


def test_stop_tokens_end_an_answer_and_end_of_text_tokens_that_are_ignored_do_not():
    expected = greedy(tuple(PROMPTS[0]))[0]
    early, late = expected[1], expected[3]
    asked = [
        ({}, expected[:2], "stop", None),
        ({"ignore_eos": True}, expected, "length", None),
        ({"ignore_eos": True, "stop_token_ids": [late]}, expected[:4], "stop", late),
        ({"stop_token_ids": [late]}, expected[:2], "stop", None),
        ({"ignore_eos": True, "stop_token_ids": [early]}, expected[:2], "stop", early),
    ]
    assert expected.index(early) == 1
    assert expected.index(late) == 3
    running = engine(eos={early})
    found = completions(running.run([request(PROMPTS[0], **one) for one, *_ in asked]))
    for completion, (_, *ends) in zip(found, asked, strict=True):
        assert [completion.tokens, completion.finish_reason, completion.stop_reason] == ends


def test_an_end_of_text_token_at_the_limit_is_a_stop():
    tokens = greedy(tuple(PROMPTS[0]))[0]
    last = tokens.index(tokens[2])
    (found,) = completions(
        engine(eos={tokens[2]}).run([request(PROMPTS[0], max_new_tokens=last + 1)])
    )
    assert (found.tokens, found.finish_reason) == (tokens[: last + 1], "stop")


def test_the_context_ends_an_answer():
    short = engine(config=replace(TINY, max_position_embeddings=20))
    prompts = [PROMPTS[2], PROMPTS[0], [*PROMPTS[2], 1, 2]]  # 17, 5 and 19 of 20 tokens.
    found = completions(short.run([request(p) for p in prompts]))
    assert [len(c.tokens) for c in found] == [3, STEPS, 1]
    assert [c.finish_reason for c in found] == ["length"] * 3
    assert [c.tokens for c in found] == [
        greedy(tuple(p))[0][: len(c.tokens)] for p, c in zip(prompts, found, strict=True)
    ]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "is empty"),
        ([1] * TINY.max_position_embeddings, "1100 tokens.* context is 1100"),
        ([1] * 5000, "5000 tokens.* context is 1100"),
        ([3, TINY.vocab_size], "outside the vocabulary of 263"),
        ([-1], "outside the vocabulary of 263"),
    ],
)
def test_a_bad_prompt_is_counted_from_1_and_named_before_anything_runs(prompt, words):
    with pytest.raises(MeshwenError, match=f"^prompt 2 .*{words}") as error:
        engine(max_num_seqs=1).run([request(PROMPTS[0]), request(prompt)])
    assert "\n" not in str(error.value)


@every_mesh
def test_logits_that_are_nan_are_an_error_of_their_request_and_of_no_other(mesh, monkeypatch):
    if mesh == "1":  # What a kernel does not read, XLA multiplies with 0.
        monkeypatch.setattr("meshwen.ops.cpu.kernels.instruction_set", lambda: None)
    runner, used = MeshModel(TINY, mesh).runner, {0}  # 0 pads prompts.
    for prompt in PROMPTS:
        used |= {*prompt, *greedy(tuple(prompt))[0]}
    bad = min({*range(TINY.vocab_size)} - used)
    monkeypatch.setattr(runner, "params", with_nan(runner, bad))
    # In every row first; who gets one next overwrites less of it than there was.
    asked = [request([*PROMPTS[3], bad], logprobs=True)] * 4 + [*map(request, PROMPTS)]
    asked += [request([bad])]
    *failed, a, b, c, d, also = completions(engine_of(runner).run(asked))
    for one, prompt in zip((a, b, c, d), PROMPTS, strict=True):
        assert (one.tokens, one.error) == (greedy(tuple(prompt))[0], None)
    for one in (*failed, also):
        assert (one.tokens, one.text, one.finish_reason) == ((), "", "error")
        assert "logits for token 1 of the answer are NaN or infinite" in one.error
    # And where an answer itself comes to it.
    after = greedy(tuple(PROMPTS[0]))[0][2]
    monkeypatch.setattr(runner, "params", with_nan(runner, after))
    (found,) = completions(engine_of(runner).run([request(PROMPTS[0])]))
    assert (found.tokens, found.finish_reason) == (greedy(tuple(PROMPTS[0]))[0][:3], "error")


def test_what_a_cancelled_request_left_does_not_reach_the_next_in_its_row(monkeypatch):
    monkeypatch.setattr("meshwen.ops.cpu.kernels.instruction_set", lambda: None)
    runner, (following, other, _, long) = MeshModel(TINY, "1").runner, PROMPTS
    bad = greedy(tuple(long))[0][2]
    for prompt in (following, other):
        assert bad not in (0, *prompt, *greedy(tuple(prompt))[0])
    monkeypatch.setattr(runner, "params", with_nan(runner, bad))
    ready, came = engine_of(runner, max_num_seqs=2), []

    def cancel(_):  # In the step that has no token for the one that is cancelled.
        if len(came) == 3:
            ready.cancel(cancelled)

    ready.submit(request(other, max_new_tokens=20), cancel)
    cancelled = ready.submit(request(long), came.append)
    while ready.busy and (len(came) < 3 or ready.unfinished(cancelled)):
        ready.step()
    assert tuple(event.token for event in came) == greedy(tuple(long))[0][:3]
    (found,) = completions(ready.run([request(following)]))
    assert (found.tokens, found.error) == (greedy(tuple(following))[0], None)


def test_closing_the_events_early_leaves_the_engine_ready():
    ready = engine()
    events = ready.run([request(prompt) for prompt in PROMPTS])
    assert next(events).token == greedy(tuple(PROMPTS[0]))[0][0]
    events.close()
    assert list(events) == []
    found = completions(ready.run([request(prompt) for prompt in PROMPTS]))
    assert [c.tokens for c in found] == [greedy(tuple(p))[0] for p in PROMPTS]


# --- Long prompts


@every_mesh
def test_prompts_prefilled_in_chunks_give_what_one_pass_gives(mesh):
    lengths = [40, 3, 90, 32]
    token_ids = random_tokens(TINY, len(lengths), max(lengths) + 2, seed=5)
    prompts = [row[:length].tolist() for row, length in zip(token_ids, lengths, strict=True)]
    requests = [request(prompt, max_new_tokens=3, logprobs=True) for prompt in prompts]
    chunked = engine_of(model(mesh).runner, max_num_batched_tokens=16)
    found = completions(chunked.run(requests))
    for row, length, completion in zip(token_ids, lengths, found, strict=True):
        row[length : length + 2] = completion.tokens[:2]
    logits = model().logits(token_ids).astype(np.float64)  # A token sees none that come after it.
    for row, length, completion in zip(logits, lengths, found, strict=True):
        scores = row[length - 1 : length + 2]
        assert completion.tokens == tuple(scores.argmax(axis=1).tolist())
        best = scores.max(axis=1, keepdims=True)
        expected = -np.log(np.exp(scores - best).sum(axis=1))
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-4)


def test_without_kernels_many_scores_are_computed_in_groups(monkeypatch):
    monkeypatch.setattr("meshwen.ops.cpu.kernels.instruction_set", lambda: None)
    monkeypatch.setattr("meshwen.ops.paged._GROUP_BYTES", 1)
    runs = engine_of(MeshModel(TINY).runner)
    found = completions(runs.run([request(prompt, logprobs=True) for prompt in PROMPTS]))
    for completion, prompt in zip(found, PROMPTS, strict=True):
        tokens, logprobs = greedy(tuple(prompt))
        assert completion.tokens == tokens
        np.testing.assert_allclose(completion.logprobs, logprobs, rtol=0, atol=1e-4)


# --- Static shapes


@pytest.fixture
def compiled(caplog):
    """The programs compiled since the last call, by name."""
    with jax.log_compiles(), caplog.at_level(logging.WARNING):

        def names() -> list[str]:
            found = re.findall(r"Finished XLA compilation of jit\((\S+)\)", caplog.text)
            caplog.clear()
            return found

        yield names
    caplog.clear()  # A failing test shows what it found, not the whole log.


@every_mesh
def test_a_step_compiles_once_for_a_number_of_tokens(mesh, compiled):
    runs = engine_of(MeshModel(TINY, mesh).runner)
    compiled()
    list(runs.run([request(prompt, **SAMPLED[1]) for prompt in PROMPTS]))
    programs = [name for name in compiled() if name.endswith("_step")]
    # All prompts, what follows them, and a token of each answer.
    assert programs == ["forward_step", "sample_step", "sampling_step"]
    # As many in sum, to a shape bucket; and none is shared with the prompts above.
    others = [random_tokens(TINY, 1, n, seed=9)[0].tolist() for n in (20, 28, 6, 3)]
    list(runs.run([request(p, **SAMPLED[1] | {"seed": 8}) for p in others]))
    assert compiled() == []


def test_a_longer_prompt_compiles_no_more_than_its_bucket(compiled):
    list(engine().run([request(PROMPTS[0])]))
    compiled()
    list(engine().run([request([1] * 33)]))
    assert "forward_step" in compiled()  # So that the test above can see what it looks for.
    list(engine().run([request([2] * 40)]))
    assert compiled() == []


# --- The compiled steps


def one_sequence(count: int, tokens: int, blocks: int = 1, start: int = 0) -> StepInputs:
    """A step of `count` tokens of a sequence that has so many blocks, compiled for `tokens`."""
    own = RowTokens(0, start, [1] * count)
    return step_inputs([[own]], 1, tokens, tables_in_order(1, 1, blocks))


def test_a_step_consumes_the_cache_it_is_given():
    runner = model().runner
    params = [SamplingParams(repetition_penalty=1.1)]
    method, rows = SamplingMethod.of(params, TINY.vocab_size), SamplerRows.of(params)
    cache, tokens = runner.empty_blocks(2), jax.numpy.zeros((1, TINY.vocab_size), bool)
    seen = Penalized(tokens, None)
    sampled, seen_after, after = runner.step(cache, one_sequence(3, 4), rows, seen, method)
    assert tokens.is_deleted()
    assert all(array.is_deleted() for array in jax.tree.leaves(cache))
    inputs = one_sequence(1, 1, start=3)
    hidden, last = runner.forward(after, inputs)
    assert all(array.is_deleted() for array in jax.tree.leaves(after))
    alive = jax.tree.leaves((sampled, seen_after, hidden, last, runner.params))
    assert not any(array.is_deleted() for array in alive)


# A kernel reads the blocks where they are, of heads of any dimension; XLA gathers a table's.
@pytest.mark.parametrize("head_dim", [TINY.head_dim, 32])
@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=needs_kernels)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_step_copies_no_layer_of_the_cache(tokens, dtype, kernel, head_dim, monkeypatch):
    if not kernel:
        monkeypatch.setattr("meshwen.ops.cpu.kernels.instruction_set", lambda: None)
    runner = MeshModel(replace(ONE_LAYER, head_dim=head_dim), "1", dtype=dtype).runner
    cache, inputs = runner.empty_blocks(9), one_sequence(tokens, tokens, blocks=3)
    program = runner.forward_program.lower(runner.params, cache, inputs).compile().as_text()
    assert ("meshwen_paged_attention" in program) == kernel
    for array in cache[0]:
        shape = rf"\[{','.join(map(str, array.shape))}\]"
        assert re.search(shape, program)
        assert not re.search(rf"= \w+{shape}\S* (copy|bitcast-convert)\(", program)
        assert not re.search(rf" pad\(\w+{shape}", program)


_GATHER = re.compile(r"= (\w+)\[([\d,]+)\]\S* all-gather\(")


@pytest.mark.parametrize(
    ("mesh", "rows_a_device", "sampling", "candidates"),
    [
        ("2x4", 4, {}, 1),
        ("2x4", 4, {"temperature": 1.0, "top_k": 6}, 8),
        ("2x4", 4, {"temperature": 1.0}, 1),
        (SPLIT, 2, {"temperature": 1.0, "top_k": 6}, 8),
    ],
)
def test_the_sampler_gathers_its_candidates_only(mesh, rows_a_device, sampling, candidates):
    runner, batch = model(mesh).runner, 4
    params = [SamplingParams(**sampling)] * batch
    method, rows = SamplingMethod.of(params, TINY.vocab_size), SamplerRows.of(params)
    parts = in_parts(
        np.zeros((batch, 1), np.int32), np.zeros(batch, np.int32), runner.plan.data_devices
    )
    inputs = step_inputs(
        parts, rows_a_device, rows_a_device, tables_in_order(len(parts), rows_a_device, 1)
    )
    lowered = runner.sampling_program.lower(
        runner.params, runner.empty_blocks(5), inputs, rows, None, method=method
    )
    gathered = _GATHER.findall(lowered.compile().as_text())
    shape = f"{rows_a_device},{runner.plan.model_devices * candidates}"
    assert sorted(gathered) == [("f32", shape), ("s32", shape)]
    assert runner.plan.model_devices * candidates < ceil(TINY.vocab_size / 4)


# --- Text and stop strings


@pytest.fixture(scope="module")
def speller(tmp_path_factory):
    folder = write_speller(tmp_path_factory.mktemp("models") / "speller")
    return Qwen2ForCausalLM.from_pretrained(folder, dtype="float32")


TREE = "\N{CHRISTMAS TREE}"


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ((), ANSWER, 9),
        (("i",), "H", 2),
        (("i ",), "H", 3),
        ((TREE,), "Hi ", 7),
        ((f" {TREE}!",), "Hi", 8),
        ((f"{TREE}?", "iX", "!!"), ANSWER, 9),
        ((f"{TREE}!", f"i {TREE}"), "H", 7),
        (("!", f"i {TREE}!"), "H", 8),
        (("<|im_end|>",), ANSWER, 9),
    ],
)
def test_a_stop_string_ends_the_answer_at_the_token_that_completes_it(speller, stop, text, tokens):
    prompt = speller.tokenizer.encode("\n")
    events = list(speller.engine.run([request(prompt, stop=stop, max_new_tokens=20)]))
    completion = events[-1].completion
    assert completion.tokens == tuple(answer_ids()[:tokens])
    assert completion.text == text == "".join(event.text for event in events)
    assert completion.finish_reason == "stop"
    ended = tokens < 9 or "<|im_end|>" in stop
    assert completion.stop_reason == (stop[-1] if ended else None)


@pytest.mark.parametrize(("stop", "text", "tokens"), [("i", "Hi", 2), ("<|im_end|>", ANSWER, 9)])
def test_the_text_of_a_stop_token_is_shown_unless_it_is_special(speller, stop, text, tokens):
    prompt, (token,) = speller.tokenizer.encode("\n"), speller.tokenizer.encode(stop)
    asked = request(prompt, stop_token_ids=[token], max_new_tokens=20, ignore_eos=True)
    *_, last = speller.engine.run([asked])
    assert (last.completion.tokens, last.completion.text) == (tuple(answer_ids()[:tokens]), text)
    assert (last.completion.finish_reason, last.completion.stop_reason) == ("stop", token)


@pytest.mark.parametrize(
    ("stop", "text", "tokens", "reason"),
    [
        ((), ANSWER, 9, "length"),
        (("<|im_end|>",), ANSWER, 9, "stop"),
        (("|im_",), ANSWER, 9, "stop"),
        ((f"{TREE}!<|im_end|>",), "Hi ", 9, "stop"),
        (("<|im_end|>!",), ANSWER, 9, "length"),  # What is held comes out at the end.
        (("<|im_end|>", f"{TREE}"), "Hi ", 7, "stop"),
    ],
)
def test_stop_strings_see_special_tokens_and_texts_do_not(speller, stop, text, tokens, reason):
    without_eos = Engine(
        speller.runner, speller.tokenizer, (), EngineOptions().cache_plan(speller.runner.model)
    )
    prompt = speller.tokenizer.encode("\n")
    events = list(without_eos.run([request(prompt, stop=stop, max_new_tokens=9)]))
    completion = events[-1].completion
    assert completion.tokens == tuple(answer_ids()[:tokens])
    assert completion.text == text == "".join(event.text for event in events)
    assert completion.finish_reason == reason


def test_a_character_cut_by_the_limit_is_shown_as_such(speller):
    prompt = speller.tokenizer.encode("\n")
    (found,) = completions(speller.engine.run([request(prompt, max_new_tokens=5)]))
    assert (found.text, found.finish_reason) == ("Hi \N{REPLACEMENT CHARACTER}", "length")
    stop = ("\N{REPLACEMENT CHARACTER}",)
    (found,) = completions(speller.engine.run([request(prompt, max_new_tokens=5, stop=stop)]))
    assert (found.text, found.finish_reason) == ("Hi ", "stop")


def cut(text: str, stop: list[str]) -> str | None:
    """The text before the first stop string; None where there is none."""
    starts = [i for i in range(len(text)) if any(text[i:].startswith(s) for s in stop)]
    return text[: starts[0]] if starts else None


few_letters = st.text("ab", max_size=5)
# A text, and what a special token behind it is written as.
piece = st.tuples(few_letters, st.one_of(st.just(""), few_letters))


@given(
    st.lists(piece, max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_text_is_cut_at_the_first_stop_string_and_no_part_of_one_is_shown(pieces, stop):
    found, shown, written, is_text = StopText(stop), "", "", []
    for text, special in pieces:
        written += text + special
        is_text += [True] * len(text) + [False] * len(special)
        shown += found.push(text, special)
        answer = cut(written, stop)
        assert found.stopped == (answer is not None)
        if answer is None:
            # What is held back begins a stop string; what is shown was the most that could be.
            ends = [n for n in range(len(written)) if any(s.startswith(written[n:]) for s in stop)]
            answer = written[: min(ends, default=len(written))]
        assert shown == "".join(itertools.compress(answer, is_text))
        if found.stopped:
            assert shown == found.shown
            assert found.push("more", "special") == found.finish() == ""
            return
    assert shown + found.finish() == "".join(itertools.compress(written, is_text)) == found.shown
    assert not found.stopped


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([("ab", ""), ("cd", ""), ("ef", "")], ["a", "bcd"]),
        ([("abcd", "")], ["abcd"]),
        ([("xb", ""), ("y", "")], ["x", "by"]),
        ([("ab", "<end>"), ("more", "")], ["ab<end>"]),
    ],
)
def test_a_stop_string_that_is_included_is_the_end_of_the_text(pieces, expected):
    found = StopText(["bcd", "<end>"], include=True)
    shown = [text for piece in pieces if (text := found.push(*piece))]
    assert shown == expected
    assert found.finish() == ""
    assert found.shown == "".join(expected)
    assert found.stopped == (pieces[0] != ("xb", ""))
