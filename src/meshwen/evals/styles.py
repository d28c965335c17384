# SPDX-License-Identifier: Apache-2.0
"""Prompt styles: how a problem is asked, where an answer ends, how it is found and graded.

Each is as its source defines it, so that scores can be held against published ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from meshwen.common.choices import PROMPT_STYLES, check_choice
from meshwen.errors import MeshwenError
from meshwen.evals.answers import boxed, gold_answer, matches, same_number
from meshwen.evals.numerals import last_number


@dataclass(frozen=True)
class Problem:
    """A word problem.

    Attributes:
        number: its place in the data, from 0.
        question: the text.
        solution: the reference solution, which ends with `#### ` and the answer.
    """

    number: int
    question: str
    solution: str

    @property
    def gold(self) -> str:
        """The reference answer."""
        found = gold_answer(self.solution)
        assert found is not None  # Data is refused before a problem is made of it.
        return found


Extract = Callable[[str], str | None]


@dataclass(frozen=True)
class PromptStyle:
    """One way to ask and to grade.

    Attributes:
        name: of the style.
        source: where it is defined.
        ask: a question as text.
        system: a system message; None for the model's own, where the prompt is a conversation.
        conversation: whether the chat template frames the question.
        shots: solved problems before the question.
        stop: strings that end an answer.
        stops_at_eos: whether the tokenizer's `eos_token` does too, whatever the model's is.
        max_new_tokens: most tokens of an answer, unless another limit is given.
        extract: finds an answer in a text. The first is what counts; others are told beside it.
        equal: whether what was found is the reference answer.
        grading: raised when answers come to end elsewhere, or `extract` or `equal` to find or to
            hold something else, so that a run is not gone on with by other rules.
    """

    name: str
    source: str
    ask: Callable[[str], str]
    extract: dict[str, Extract]
    equal: Callable[[str | None, str], bool]
    grading: int = 1
    system: str | None = None
    conversation: bool = False
    shots: int = 0
    stop: tuple[str, ...] = ()
    stops_at_eos: bool = False
    max_new_tokens: int = 512
    joined: Callable[[str, str], str] = field(default=lambda question, answer: question + answer)

    def text(self, problem: Problem, examples: Sequence[Problem] = ()) -> str:
        """The prompt's text: solved examples, and the question."""
        solved = [self.joined(self.ask(one.question), one.solution) for one in examples]
        return "\n\n".join([*solved, self.ask(problem.question)])

    def stop_strings(self, eos_token: str | None) -> tuple[str, ...]:
        """Strings that end an answer, the tokenizer's `eos_token` included where it is to."""
        return (*self.stop, eos_token) if self.stops_at_eos and eos_token else self.stop


def shots(style: PromptStyle, train: Sequence[Problem], problems: int) -> list[list[Problem]]:
    """The solved examples of each problem from the first on.

    lm-evaluation-harness draws them anew for every problem, from one generator seeded with 1234.

    Raises:
        MeshwenError: there are fewer than the style shows.
    """
    if len(train) < style.shots:
        raise MeshwenError(
            f"prompt style {style.name} shows {style.shots} solved examples, and there are only "
            f"{len(train)} to choose from: give more with --train"
        )
    generator = Random(1234)
    return [generator.sample(train, style.shots) for _ in range(problems)]


def prompt_style(name: str) -> PromptStyle:
    """A style by name.

    Raises:
        MeshwenError: there is none of this name.
    """
    check_choice("the prompt style", name, PROMPT_STYLES)
    return STYLES[name]


_AFTER = ("he answer is", "final answer is")
_IN_CHINESE = "答案是"


def _qwen_answer(text: str) -> str | None:
    """What Qwen2.5-Math's parser finds, in its order.

    Minerva's last sentence, a box, what follows "the answer is", the paragraph after the first
    "答案是", and else the last number.
    """
    before, hope, _ = text.partition("final answer is $")[2].partition("$. I hope")
    found = boxed(before if hope else text)
    if hope:
        return (before if found is None else found).strip()
    if found is not None:
        return found.strip()
    for phrase in _AFTER:
        if phrase in text:
            return text.rpartition(phrase)[2].strip().lstrip(":\uff1a").strip()
    if _IN_CHINESE in text:
        return text.split(_IN_CHINESE)[1].strip().partition("\n\n")[0].lstrip(":\uff1a").strip()
    return last_number(text)


def _first(pattern: str) -> Extract:
    compiled = re.compile(pattern)
    return lambda text: next(iter(matches(compiled, text)), None)


def _last(pattern: str) -> Extract:
    compiled = re.compile(pattern)
    return lambda text: next(reversed(matches(compiled, text)), None)


# lm-evaluation-harness compares texts, after it has taken these out of both.
_IGNORED = [re.compile(pattern) for pattern in (",", r"\$", r"(?s).*#### ", r"\.$")]


def _same_text(extracted: str | None, gold: str) -> bool:
    if extracted is None:
        return False
    for pattern in _IGNORED:
        extracted, gold = pattern.sub("", extracted), pattern.sub("", gold)
    return extracted.lower() == gold.lower()


_FLEXIBLE = _last(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_HARNESS = "EleutherAI/lm-evaluation-harness, lm_eval/tasks/gsm8k"

STYLES = {
    style.name: style
    for style in (
        PromptStyle(
            name="qwen-boxed",
            source="QwenLM/Qwen2.5-Math, evaluation (qwen25-math-cot)",
            ask=lambda question: question,
            system="Please reason step by step, and put your final answer within \\boxed{}.",
            conversation=True,
            stop=("</s>", "<|im_end|>", "<|endoftext|>"),
            extract={"boxed": _qwen_answer},
            equal=same_number,
            grading=2,
        ),
        PromptStyle(
            name="lm-eval",
            source=f"{_HARNESS}/gsm8k.yaml, version 3",
            ask=lambda question: f"Question: {question}\nAnswer:",
            shots=5,
            joined=lambda question, answer: f"{question} {answer}",
            stop=("Question:", "</s>", "<|im_end|>"),
            stops_at_eos=True,
            max_new_tokens=256,
            extract={
                "strict-match": _first(r"#### (\-?[0-9\.\,]+)"),
                "flexible-extract": _FLEXIBLE,
            },
            equal=_same_text,
            grading=2,
        ),
        PromptStyle(
            name="lm-eval-cot-zeroshot",
            source=f"{_HARNESS}/gsm8k-cot-zeroshot.yaml, version 3",
            ask=lambda question: f"Q: {question}\nA: Let's think step by step.",
            stop=("Q:", "</s>", "<|im_end|>"),
            stops_at_eos=True,
            max_new_tokens=256,
            extract={
                "flexible-extract": _FLEXIBLE,
                "strict-match": _first(r"The answer is (\-?[0-9\.\,]+)."),
            },
            equal=_same_text,
            grading=2,
        ),
        PromptStyle(
            name="demo",
            source="the demo model's training conversations",
            ask=lambda question: question,
            conversation=True,
            extract={"strict-match": _last(r"####\s*(\S+)")},
            equal=same_number,
            grading=2,
        ),
    )
}
