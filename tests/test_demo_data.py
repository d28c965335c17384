# SPDX-License-Identifier: Apache-2.0
"""The embedded demo checkpoint's files, and the generator of its problems."""

import importlib
import json
import operator
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tokenizers import Tokenizer

from meshwen import demo

SCRIPTS = Path(__file__).parents[1] / "scripts"
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
LIMIT = 12_000_000


def held_out() -> list[dict[str, str]]:
    lines = (demo.path() / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def operations(answer: str) -> list[tuple[int, str, int, int]]:
    found = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", answer)
    return [(int(a), op, int(b), int(result)) for a, op, b, result in found]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("demo_problems")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def problems(generator: ModuleType):
    return generator.ProblemSet(0)


def test_held_out_problems_have_gsm8k_form():
    rows = held_out()
    assert len(rows) == 200
    for row in rows:
        assert set(row) == {"question", "answer"}
        assert re.fullmatch(r"[^#]+\n#### \d+", row["answer"])
    assert len({row["question"] for row in rows}) == 200


def test_held_out_steps_are_true_and_lead_to_the_answer():
    for row in held_out():
        steps = operations(row["answer"])
        assert 2 <= len(steps) <= 4
        assert all(OPERATIONS[op](a, b) == result for a, op, b, result in steps), row
        assert steps[-1][3] == int(row["answer"].rpartition("#### ")[2])


def test_held_out_steps_use_only_what_is_known():
    """Each operand is in the question, a result, or a fact such as a cow's legs."""
    facts = {2, 3, 4, 5, 10}
    for row in held_out():
        known = facts | {int(n) for n in re.findall(r"\d+", row["question"])}
        for a, _, b, result in operations(row["answer"]):
            assert {a, b} <= known, row
            known.add(result)


def test_held_out_file_is_what_the_generator_makes(problems):
    made = [{"question": p.question, "answer": p.answer} for p in problems.held_out]
    assert made == held_out()


def test_training_stream_has_no_held_out_numbers(problems):
    kept_back = {(problem.template, problem.numbers) for problem in problems.held_out}
    for template in problems.templates:
        offered = {(template.name, tuple(numbers)) for numbers in template.choices.tolist()}
        assert offered
        assert not offered & kept_back


def test_training_stream_has_no_held_out_question_and_true_steps(problems):
    questions = {row["question"] for row in held_out()}
    rng = np.random.default_rng(7)
    for _ in range(2000):
        problem = problems.draw(rng)
        assert problem.question not in questions
        assert not re.search(r"[{}|\[\]]", problem.question + problem.answer)
        steps = operations(problem.answer)
        assert all(OPERATIONS[op](a, b) == result for a, op, b, result in steps), problem
        assert problem.answer.endswith(f"\n#### {steps[-1][3]}")


def test_plain_sums_are_true_and_in_the_order_asked(problems):
    rng = np.random.default_rng(7)
    for _ in range(500):
        problem = problems.plain_sums(rng, most=4)
        steps = operations(problem.answer)
        asked = re.findall(r"(\d+)([-+*/])(\d+)", problem.question)
        assert asked == [(str(a), op, str(b)) for a, op, b, _ in steps]
        assert all(OPERATIONS[op](a, b) == result for a, op, b, result in steps), problem
        assert problem.answer.endswith(f"\n#### {steps[-1][3]}")


def test_problems_follow_from_the_seed(generator, problems):
    again = generator.ProblemSet(0)
    first, second = (
        [p.draw(rng) for rng in [np.random.default_rng(3)] for _ in range(20)]
        for p in (problems, again)
    )
    assert first == second
    assert generator.ProblemSet(1).held_out != problems.held_out


@pytest.mark.parametrize(
    ("op", "a", "b", "easy"),
    [
        ("+", 23, 27, True),
        ("+", 23, 28, False),
        ("+", 1, 5, False),
        ("-", 50, 27, True),
        ("-", 51, 27, False),
        ("-", 20, 19, False),
        ("*", 12, 8, True),
        ("*", 25, 4, True),
        ("*", 13, 12, False),
        ("/", 96, 12, True),
        ("/", 10, 4, False),
        ("/", 144, 12, False),
    ],
)
def test_is_easy(generator, op, a, b, easy):
    assert generator.is_easy(op, np.array(a), np.array(b)) == easy


def test_tokenizer_keeps_every_byte():
    tokenizer = Tokenizer.from_file(str(demo.path() / "tokenizer.json"))
    text = "Ünïcödé 漢字 🙂 \x00\x7f tab\t 1234.5\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert sum(len(token) == 1 for token in tokenizer.get_vocab()) == 256


def test_tokenizer_has_one_token_for_each_number_and_chat_mark():
    tokenizer = Tokenizer.from_file(str(demo.path() / "tokenizer.json"))
    for token in (*map(str, range(101)), "<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert tokenizer.encode(token).tokens == [token]


def test_config_is_a_sixteenth_of_qwen2_5_7b():
    config = json.loads((demo.path() / "config.json").read_text())
    assert config["hidden_size"] * 16 == 3584
    assert config["intermediate_size"] * 16 == 18944
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (28, 4)
    assert config["tie_word_embeddings"] is False
    tokenizer = Tokenizer.from_file(str(demo.path() / "tokenizer.json"))
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert config["eos_token_id"] == tokenizer.token_to_id("<|im_end|>")


def test_files_are_small_enough():
    files = [file for file in demo.path().iterdir() if file.is_file()]
    names = {file.name for file in files}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
            "tokenizer_config.json", "heldout.jsonl", "DATA_CARD.md"} <= names  # fmt: skip
    assert sum(file.stat().st_size for file in files) <= LIMIT
