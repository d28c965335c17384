# SPDX-License-Identifier: Apache-2.0
"""A problem is asked, and its answer found and graded, as the source of the style has it."""

import json

import pytest

from meshwen.checkpoints import open_checkpoint
from meshwen.common.choices import PROMPT_STYLES
from meshwen.engine.request import Completion, Event, Timings
from meshwen.engine.sampling import NO_TOKEN
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError
from meshwen.evals.default_style import default_style
from meshwen.evals.gsm8k import Question, answer_all
from meshwen.evals.run_file import RunFile
from meshwen.evals.styles import STYLES, Problem, prompt_style, shots
from meshwen.tokenizer.tokenizer import Tokenizer
from speller import TEMPLATE, write_speller

PROBLEM = Problem(0, "How many?", "1+1=<<1+1=2>>2\n#### 2")
TRAIN = [Problem(i, f"q{i}", f"a\n#### {i}") for i in range(20)]


def graded(style: str, text: str, gold: str = "18") -> dict[str, bool]:
    one = prompt_style(style)
    return {name: one.equal(extract(text), gold) for name, extract in one.extract.items()}


def test_the_harness_asks_after_solved_examples():
    style = prompt_style("lm-eval")
    assert style.text(PROBLEM, TRAIN[:2]) == (
        "Question: q0\nAnswer: a\n#### 0\n\nQuestion: q1\nAnswer: a\n#### 1\n\n"
        "Question: How many?\nAnswer:"
    )
    assert prompt_style("lm-eval-cot-zeroshot").text(PROBLEM) == (
        "Q: How many?\nA: Let's think step by step."
    )


def test_examples_of_a_problem_do_not_depend_on_how_many_follow():
    style = prompt_style("lm-eval")
    few, many = shots(style, TRAIN, 2), shots(style, TRAIN, 9)
    assert many[:2] == few
    assert len({one.number for one in few[0]}) == 5
    assert few[0] != few[1]


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("2*9=18\n#### 18", True, True),
        ("#### $18", False, True),
        ("#### 1,8", True, True),
        ("#### 18.", True, True),
        ("#### 18.00", False, False),  # Texts are compared, not values.
        ("the answer is $18.", False, True),
        ("#### 17 \n#### 18", False, True),
        ("18 or 19", False, False),
        ("none", False, False),
    ],
)
def test_the_harness_compares_texts(text, strict, flexible):
    assert graded("lm-eval", text) == {"strict-match": strict, "flexible-extract": flexible}


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [("The answer is 18.", True, True), ("So 18", False, True), ("The answer is 1", False, False)],
)
def test_the_harness_grades_zero_shot_reasoning(text, strict, flexible):
    found = graded("lm-eval-cot-zeroshot", text)
    assert found == {"flexible-extract": flexible, "strict-match": strict}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (r"Thus \boxed{18}", True),
        (r"Thus \boxed{\$18.00 \text{ a day}}", True),
        (r"\boxed{9}, no: \boxed{18}", True),
        (r"\boxed{9}. The answer is 18", False),  # A box goes before words.
        ("The answer is: $18.", True),
        ("So 9+9 makes 18 dollars.", True),
        ("18 or 19", False),
        ("", False),
        ("The final answer is $18$. I hope it is correct. \\boxed{9}", True),  # As Minerva ends.
        (r"The final answer is $\boxed{18}$. I hope it is correct.", True),
        ("一共有18支笔。", True),
        ("3+15=18\uff0c所以共有18支", True),
        (r"\boxed{共18元}", True),
        ("答案是18。", True),
        ("答案是\uff1a18\n\n验算\uff1a9 + 9 = 19", True),  # The paragraph alone.
        (
            "答案是18。\n\n另一题的答案是19。",
            True,
        ),  # The first: a model may go on to other problems.
        ("it is USD18", True),
        ("it is _18_", True),
    ],
)
def test_qwens_style_takes_the_box_and_compares_values(text, right):
    assert graded("qwen-boxed", text) == {"boxed": right}


def test_the_demo_answers_behind_its_mark():
    assert graded("demo", "2*9=18 dollars\n#### 18\n") == {"strict-match": True}
    assert graded("demo", "18") == {"strict-match": False}


def test_conversations_are_framed_by_the_chat_template():
    assert {name for name, style in STYLES.items() if style.conversation} == {"qwen-boxed", "demo"}
    assert r"\boxed{}" in prompt_style("qwen-boxed").system
    assert STYLES["qwen-boxed"].stop == ("</s>", "<|im_end|>", "<|endoftext|>")
    assert not STYLES["demo"].stop  # It was trained to end by itself.


def test_an_unknown_style_names_the_known():
    with pytest.raises(MeshwenError, match=r"style must be qwen-boxed, .* or demo, not 'gsm'"):
        prompt_style("gsm")
    assert tuple(STYLES) == PROMPT_STYLES


class Canned:
    """An engine that is asked, and has one event to tell."""

    def __init__(self, *events):
        self._events = events

    def check(self, request, name):
        pass

    def run(self, requests):
        self.requests = requests
        return self._events


def answered(folder, style, engine, eos_token=None):
    run = RunFile.begin(folder / "run.jsonl", {}, resume=False)
    asked = [Question(Problem(0, "How many?", "#### 7"), (1, 2))]
    answer_all(engine, asked, prompt_style(style), SamplingParams(), run, eos_token)
    run.close()
    return run.records


def test_an_answer_that_failed_is_recorded_as_such(tmp_path):
    failed = Completion((1, 2), (5,), "7", "error", None, Timings(0, 0, 0), None, "NaN")
    event = Event(0, NO_TOKEN, "", None, failed)
    (record,) = answered(tmp_path, "demo", Canned(event)).values()
    assert (record["finish_reason"], record["error"]) == ("error", "NaN")
    assert (record["tokens"], record["correct"], record["logprob"]) == ([], False, None)


@pytest.mark.parametrize(
    ("style", "stop"),
    [
        ("qwen-boxed", ("</s>", "<|im_end|>", "<|endoftext|>")),
        ("lm-eval", ("Question:", "</s>", "<|im_end|>", "<|endoftext|>")),
        ("lm-eval-cot-zeroshot", ("Q:", "</s>", "<|im_end|>", "<|endoftext|>")),
        ("demo", ()),
    ],
)
def test_the_harnesss_styles_also_stop_at_the_tokenizers_own_eos(tmp_path, style, stop):
    engine = Canned()
    answered(tmp_path, style, engine, "<|endoftext|>")
    (request,) = engine.requests
    assert request.sampling.stop == stop


@pytest.mark.parametrize(
    ("template", "eos", "style", "why"),
    [
        (TEMPLATE, "<|im_end|>", "qwen-boxed", "ends texts as turns of it end"),
        (TEMPLATE, "<|endoftext|>", "lm-eval", "<|im_end|> ends a turn"),  # As Qwen2.5's base.
        (None, "<|im_end|>", "lm-eval", "no chat template"),
        ("{{ messages[0].content }}", "<|endoftext|>", "qwen-boxed", ""),  # Nothing ends a turn.
        ("{{ raise_exception('no') }}", "<|endoftext|>", "qwen-boxed", ""),
    ],
)
def test_a_base_model_is_told_by_its_template_and_its_ends(tmp_path, template, eos, style, why):
    folder = write_speller(tmp_path)
    named = {"eos_token": eos} | ({} if template is None else {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    config = json.loads((folder / "config.json").read_text())
    ends = 258 if eos == "<|im_end|>" else 256
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    with open_checkpoint(str(folder)) as checkpoint:
        found, said = default_style(checkpoint, Tokenizer.from_checkpoint(checkpoint))
    assert found == style
    assert why in said
