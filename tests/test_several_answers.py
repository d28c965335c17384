# SPDX-License-Identifier: Apache-2.0
"""`n` answers to one prompt: each is what its seed gives alone, and they share blocks."""

from dataclasses import replace

import pytest

from mesh_model import shared_model
from meshwen import MeshwenError, Qwen2ForCausalLM
from meshwen.cache.budget import KVCachePlan
from meshwen.engine.answer_text import AnswerText
from meshwen.engine.engine import Engine
from meshwen.engine.request import Request
from meshwen.engine.sampling_params import SamplingParams
from tiny_model import ONE_LAYER

pytestmark = pytest.mark.usefixtures("unoptimised")

SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=6, seed=5, logprobs=True)
PROMPT = tuple(range(1, 41))  # A full block, and a part of one.


def engine(rows: int = 4, blocks: int = 16, *, prefix_caching: bool = True) -> Engine:
    plan = KVCachePlan(blocks, 32, 1, 1, max_num_seqs=rows, max_model_len=60)
    runner = shared_model(ONE_LAYER, numerics="exact").runner
    return Engine(runner, None, (), plan, 64, prefix_caching=prefix_caching)


def answers(of: Engine, request: Request) -> dict[int, tuple]:
    done = [event.completion for event in of.run([request]) if event.completion]
    return {one.choice: (one.tokens, one.logprobs, one.seed) for one in done}


def alone(choice: int) -> tuple:
    request = Request(PROMPT, replace(SAMPLED, seed=SAMPLED.seed + choice))
    [found] = answers(engine(prefix_caching=False), request).values()
    return found


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_each_answer_is_that_of_its_seed_however_many_run_at_once(rows, prefix_caching):
    found = answers(
        engine(rows, prefix_caching=prefix_caching), Request(PROMPT, replace(SAMPLED, n=3))
    )
    assert found == {choice: alone(choice) for choice in range(3)}
    assert len({tokens for tokens, *_ in found.values()}) == 3


def test_answers_share_the_prompts_full_blocks_and_have_a_copy_of_the_rest():
    of = engine(prefix_caching=False)
    of.submit(Request(PROMPT, replace(SAMPLED, n=3)), lambda event: None)
    of.step()
    blocks = of._core.blocks
    blocks.check()
    assert blocks.used_blocks == 1 + 3
    while of.busy:
        of.step()
    assert blocks.used_blocks == 0


def test_a_cancelled_request_loses_all_its_answers():
    of, events = engine(), []
    number = of.submit(Request(PROMPT, replace(SAMPLED, n=3)), events.append)
    of.step()
    assert [event.choice for event in events] == [0, 1, 2]
    assert {event.request for event in events} == {number}
    of.cancel(number)
    of.step()
    assert len(events) == 3
    assert not of.busy
    assert of._core.blocks.used_blocks == 0


def test_an_answer_that_cannot_be_delivered_ends_the_others_of_its_request():
    of = engine()

    def fails(event):
        if event.choice == 1:
            raise OSError("gone")

    of.submit(Request(PROMPT, replace(SAMPLED, n=3)), fails)
    with pytest.raises(OSError, match="gone"):
        of.step()
    of.step()
    assert not of.busy
    assert of._core.blocks.used_blocks == 0


def test_a_request_none_of_whose_answers_can_be_delivered_fails_once():
    of, failed, events = engine(), [], []

    def fails(event):
        failed.append(event.choice)
        raise OSError("gone")

    of.submit(Request(PROMPT, replace(SAMPLED, n=3)), fails)
    of.submit(Request(PROMPT, replace(SAMPLED, max_new_tokens=2)), events.append)
    with pytest.raises(OSError, match="gone") as raised:
        of.step()
    assert failed == [0]
    assert not hasattr(raised.value, "__notes__")
    for _ in range(3):
        of.step()
    assert (len(events), of.busy) == (2, False)
    assert of._core.blocks.used_blocks == 0


def test_a_run_none_of_whose_answers_can_be_delivered_leaves_no_error_to_others(monkeypatch):
    of = engine()
    with monkeypatch.context() as patch:
        patch.setattr(AnswerText, "push", lambda text, token: 1 // 0)
        with pytest.raises(MeshwenError, match="prompt 1: a token of its answer could not be"):
            list(of.run([Request(PROMPT, replace(SAMPLED, n=3))]))
    assert not of.busy
    of.step()


def test_generate_gives_the_answers_of_each_prompt_one_behind_the_other():
    model = Qwen2ForCausalLM(shared_model(ONE_LAYER, numerics="exact").runner, None, {})
    found = model.generate([PROMPT, (1, 2)], n=2, temperature=1.0, max_new_tokens=3, seed=5)
    assert [(one.prompt_tokens, one.choice) for one in found] == [
        (PROMPT, 0),
        (PROMPT, 1),
        ((1, 2), 0),
        ((1, 2), 1),
    ]
    with pytest.raises(MeshwenError, match="n must be 1 for a stream of text, not 2"):
        model.stream(PROMPT, n=2)


@pytest.mark.parametrize("n", [0, 129, 1.5])
def test_an_impossible_number_of_answers_is_refused(n):
    with pytest.raises(MeshwenError, match="n must be"):
        SamplingParams(n=n)
