# SPDX-License-Identifier: Apache-2.0
"""Templated grade-school word problems with worked steps: the demo checkpoint's training data.

A template is four strings: a name, the ranges of its numbers, the question, and the worked steps.

- ranges: ``a=2..12`` any whole number from 2 to 12, ``a=2|4|5`` one of a list.
- question and steps: ``(buys|finds)`` picks one wording, ``{a}`` is a number, ``{P}`` a person with
  the pronouns ``{he}``, ``{He}``, ``{his}``, ``{His}``; ``{thing}``, ``{things}``, ``{thing2}`` and
  so on come from `NOUNS`; ``{k_part}``, ``{k_percent}`` and ``{k_times}`` put a number in words.
- steps: ``[x=a*b]`` works one operation out, prints it (``3*4=12``) and names its result. The last
  result is the answer. Only numbers for which every operation passes `is_easy` are used.
"""

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from demo_templates import HE, NOUNS, NUMBER_WORDS, PLURALS, SHE, SMALL_TALK, SUMS, TEMPLATES

HELD_OUT = 200
LARGEST, LARGEST_SUM = 100, 50  # of all numbers; of sums, and of what is subtracted from
PEOPLE = {"he": HE.split(), "she": SHE.split()}


@dataclass(frozen=True)
class Problem:
    """One question and its worked answer, with the template and numbers they were made from."""

    template: str
    numbers: tuple[int, ...]
    question: str
    answer: str


def is_easy(op: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether ``a op b`` is taught: whole numbers from 2; sums to 50, products to 100."""
    if op == "-":
        return is_easy("+", a - b, b)
    if op == "/":
        return (a % b == 0) & is_easy("*", a // b, b)
    small = a + b <= LARGEST_SUM if op == "+" else a * b <= LARGEST
    return (np.minimum(a, b) >= 2) & small


OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
STEP = re.compile(r"\[(\w)=(\w+)([-+*/])(\w+)\]")
CHOICE = re.compile(r"\(([^()]*)\)")


class Words(dict):
    """What fills the slots of one problem; people and nouns are drawn when first asked for."""

    def __init__(self, rng: np.random.Generator, numbers: dict[str, int]) -> None:
        super().__init__(numbers)
        self.rng = rng
        for word, names in NUMBER_WORDS.items():
            if numbers.get("k") in names:
                self[f"k_{word}"] = names[numbers["k"]]

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def __missing__(self, slot: str) -> str:
        if slot in "PQR":
            people = [name for name in PEOPLE["she"] + PEOPLE["he"] if name not in self.values()]
            self[slot] = self.pick(people)
        elif slot.lower() in ("he", "his"):
            index = 0 if self["P"] in PEOPLE["he"] else 1
            word = {"he": ("he", "she"), "his": ("his", "her")}[slot.lower()][index]
            self[slot] = word.capitalize() if slot[0] == "H" else word
        else:
            digit = "2" if slot.endswith("2") else ""
            word = slot.removesuffix("2")
            kind = next(kind for kind in NOUNS if word in (kind, plural(kind)))
            noun = self.pick([n for n in NOUNS[kind].split() if n not in self.values()])
            self[kind + digit], self[plural(kind) + digit] = noun, plural(noun)
        return self[slot]

    def fill(self, text: str) -> str:
        chosen = CHOICE.sub(lambda match: self.pick(match[1].split("|")), text)
        return chosen.format_map(self)


def plural(noun: str) -> str:
    return PLURALS.get(noun, noun + "s")


def value_range(text: str) -> np.ndarray:
    """``2..12`` or ``2|4|5`` as an array of whole numbers."""
    if "|" in text:
        return np.array([int(value) for value in text.split("|")])
    low, _, high = text.partition("..")
    return np.arange(int(low), int(high) + 1)


class Template:
    """One kind of problem and every choice of numbers, [choices, numbers], that is easy enough."""

    def __init__(self, name: str, ranges: str, question: str, steps: str) -> None:
        self.name, self.question, self.steps = name, question, steps
        self.names, texts = zip(*(part.split("=") for part in ranges.split()), strict=True)
        grids = np.meshgrid(*(value_range(text) for text in texts), indexing="ij")
        columns = np.stack([grid.ravel() for grid in grids], axis=1)
        values = dict(zip(self.names, columns.T, strict=True))
        easy = np.ones(len(columns), bool)
        for result, left, op, right in STEP.findall(steps):
            a, b = (values[x] if x in values else np.array(int(x)) for x in (left, right))
            easy &= is_easy(op, a, b)
            values[result] = OPERATIONS[op](a, b)
        self.choices = columns[easy]

    def problem(self, choice: int, rng: np.random.Generator) -> Problem:
        numbers = tuple(int(n) for n in self.choices[choice])
        words = Words(rng, dict(zip(self.names, numbers, strict=True)))
        question = words.fill(self.question)

        def work(match: re.Match[str]) -> str:
            result, left, op, right = match.groups()
            a, b = (words[x] if x in words else int(x) for x in (left, right))
            words[result] = words["answer"] = OPERATIONS[op](a, b)
            return f"{a}{op}{b}={words[result]}"

        steps = STEP.sub(work, self.steps)
        return Problem(self.name, numbers, question, words.fill(steps + "\n#### {answer}"))


class ProblemSet:
    """All problems, split by their numbers: a held-out set, and an endless training stream.

    A held-out problem's numbers never occur in the training stream in the same template.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed, 0])
        self.templates = [Template(*texts) for texts in TEMPLATES]
        self.sums = [Template(*texts) for texts in SUMS]
        # The more there is to know of an operation, the more often it comes.
        weights = np.sqrt([len(template.choices) for template in self.sums])
        self.sum_shares = weights.cumsum() / weights.sum()
        self.held_out: list[Problem] = []
        for index in range(HELD_OUT):
            template = self.templates[index % len(self.templates)]
            choice = int(rng.integers(len(template.choices)))
            self.held_out.append(template.problem(choice, rng))
            template.choices = np.delete(template.choices, choice, axis=0)

    def draw(self, rng: np.random.Generator) -> Problem:
        """One word problem for training."""
        template = self.templates[rng.integers(len(self.templates))]
        return template.problem(int(rng.integers(len(template.choices))), rng)

    def plain_sums(self, rng: np.random.Generator, most: int) -> Problem:
        """One to `most` sums without a story; the last result is the answer."""
        sums = []
        for _ in range(rng.integers(1, most + 1)):
            template = self.sums[np.searchsorted(self.sum_shares, rng.random())]
            sums.append(template.problem(int(rng.integers(len(template.choices))), rng))
        *first, last = (problem.question for problem in sums)
        question = f"Work out {', '.join(first)} and {last}." if first else f"What is {last}?"
        steps = [problem.answer.partition("\n")[0] for problem in sums[:-1]]
        return Problem("plain sums", (), question, "\n".join([*steps, sums[-1].answer]))

    def small_talk(self, rng: np.random.Generator) -> Problem:
        question, answer = SMALL_TALK[rng.integers(len(SMALL_TALK))]
        return Problem("small talk", (), Words(rng, {}).fill(question), answer)
