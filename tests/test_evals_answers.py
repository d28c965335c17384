# SPDX-License-Identifier: Apache-2.0
"""Answers are found where they stand, and read as the numbers that they are."""

import json
from fractions import Fraction

import pytest

from meshwen.evals.answers import boxed, gold_answer, last_number, number, same_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("-5", -5),
        ("\u22125", -5),
        ("1,234,567", 1_234_567),
        ("1{,}000", 1000),
        (r"12\,000", 12_000),
        (r"5\!", 5),
        ("$18", 18),
        (r"\$1,200.50", "1200.5"),
        ("-$5", -5),
        ("$-5", -5),
        ("€7", 7),
        ("50%", 50),
        (r"50\%", 50),
        ("18.", 18),
        ("17.0", 17),
        (".5", "1/2"),
        ("3/4", "3/4"),
        ("3 1/2", "7/2"),
        (r"\frac{3}{4}", "3/4"),
        (r"\dfrac34", "3/4"),
        (r"-\frac{1}{2}", "-1/2"),
        (r"2\frac{1}{2}", "5/2"),
        (r"-2\tfrac12", "-5/2"),
        ("18 dollars", 18),
        (r"18\text{ dollars per day}", 18),
        (r"\text{Total: }7", 7),
        ("70,000 dollars", 70_000),
        (r"The answer is \(18\).", 18),
        (r"\[18\]", 18),
        (r"18\\", 18),
        (r"\underline{18}", 18),
        (r"\mathit{18}\hspace{1mm}", 18),
        ("-(18)", -18),
        ("- 18", -18),
        (r"-\$18", -18),
        (r"\frac{-1}{2}", "-1/2"),
        (r"-\frac{-1}{2}", "1/2"),
        ("x = 18", 18),
        (r"20 \times 3 = 60", 60),
        ("10 - 3 = 7 apples", 7),
        ("18 = x", 18),
        ("**5**", 5),
        ("(5)", 5),
        ("- 5", -5),
        (r"30 \text{ miles/hour}", 30),
        (r"120 \text{ cm}^2", 120),
        ("120 cm^{2}", 120),
        (r"90^\circ", 90),
        ("18 = 9 + 9", 18),
        (r"\quad18", 18),
        (r"\approx18", 18),
        (r"\displaystyle18", 18),
        (r"\thinspace 18", 18),
        (r"\enspace 18", 18),
        (r"\large 18", 18),
        (r"90^{\circ}", 90),
        (r"5\quad18", None),
        (r"90^\circ18", None),
        (r"\approximately18", None),
        ("$ - 18", -18),
        ("\u20135", -5),
        ("x = \u20135", -5),
        ("\\quad\u20135", -5),
        ("\u2013 5", 5),  # A bullet.
        ("3\u20135", None),
        ("18\u00a0dollars", 18),
        ("-\u202f18", -18),
        ("$\u200918", 18),
        (r"\frac{1,000}{2}", 500),
        (r"\cfrac{1}{2}", "1/2"),
        (r"\frac{3}{-4}", "-3/4"),
        (r"\frac{-3}{-4}", "3/4"),
        (r"\boldsymbol{18}", 18),
        (r"\textdollar 18", 18),
        ("Rs.18", 18),
        ("-Rs. 1,800", -1800),
        (r"20 \times 3", None),
        ("9 + 9", None),
        (r"18 \text{ or } 20", None),
        (r"\sqrt{16}", None),
        (r"5\pi", None),
        ("3^2", None),
        ("", None),
        ("none", None),
        ("v2", None),
        ("1/0", None),
        (r"\frac{1}{0}", None),
    ],
)
def test_a_number_is_read_as_people_and_latex_write_it(text, value):
    assert number(text) == (None if value is None else Fraction(value))


def test_answers_are_the_same_by_value():
    assert same_number(r"\$1,200.00", "1200")
    assert same_number("0.5", "1/2")
    assert not same_number("12", "-12")
    assert not same_number("no idea", "12")
    assert not same_number(None, "12")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{18}.", "18"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{8}", None),
        (r"\fboxed{8}", "8"),
        (r"$\boxed18$, so 19", "18"),
        (r"$\boxed 7$", "7"),
        (r"cut off \boxed{12", "12"),
        ("no box", None),
    ],
)
def test_the_last_box_counts(text, content):
    assert boxed(text) == content


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("5 and then 1,200 dollars.", "1,200"),
        ("it is -7.", "-7"),
        ("10-3=7", "7"),
        ("20 - 5", "5"),
        ("Remaining:\n- $18", "$18"),
        ("Remaining:\n- 18 apples", "18"),
        ("a loss of -$5.", "-$5"),
        ("nothing", None),
        ("at 3.50 each", "3.50"),
        (r"it is \quad18", "18"),
        ("a loss of \u20135.", "-5"),
        ("it takes 3\u20135 days", "5"),
        ("it costs 3%\u20135%", "5"),
        ("Remaining:\n\u2013 18 apples", "18"),
        ("it costs Rs.18", "Rs.18"),
    ],
)
def test_the_last_number_is_found_as_it_is_written(text, found):
    assert last_number(text) == found


def test_an_answer_that_went_astray_is_read_at_once_and_has_no_number():
    assert last_number("5" + " " * 100_000 + "?") == "5"  # Each blank looked at a few times.
    assert last_number("5^" + " " * 100_000 + "?") == "5"
    assert number("$ " * 100_000) is None
    assert number("9" * 5000) is None  # More digits than Python makes a number of.


def test_the_gold_answer_stands_behind_the_mark():
    assert gold_answer("2+2=<<2+2=4>>4\n#### 1,234 ") == "1,234"
    assert gold_answer("no mark") is None


@pytest.mark.parametrize(("split", "problems"), [("test", 1319), ("train", 7473)])
def test_every_gold_answer_of_gsm8k_is_read(shared, split, problems):
    lines = (shared / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == problems
    for line in lines:
        solution = json.loads(line)["answer"]
        gold = solution.rpartition("#### ")[2]
        assert gold_answer(solution) == gold
        assert number(gold) == Fraction(gold.replace(",", ""))
