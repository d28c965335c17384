# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001  (Characters that look like others are what is read here.)
"""Answers are found where they stand, and read as the numbers that they are."""

import json
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwen.evals.answers import boxed, gold_answer, same_number
from meshwen.evals.numerals import last_number, number
from meshwen.evals.styles import STYLES


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
        ("5~18", None),
        ("5\uff5e18", None),
        (r"\(5\)\(18\)", None),
        (r"\(5\) \(180\)", None),
        (r"5\\18", None),
        (r"~\(18\)~", 18),
        (r"-\(18\)", -18),
        (r"\(1\)/\(2\)", "1/2"),
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
        ("in 3 200-gram bags", "200"),
        ("a 12 000-dollar car", "12 000"),
    ],
)
def test_the_last_number_is_found_as_it_is_written(text, found):
    assert last_number(text) == found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("一共有18支笔", 18),
        ("所以共有18支", 18),
        ("_18_", 18),
        ("__18__", 18),
        ("USD18", 18),
        ("-US$18", -18),
        ("RM18", 18),
        ("₩18", 18),
        ("18。", 18),
        ("共18元", 18),
        (r"\text{共}18\text{元}", 18),
        ("총18개", 18),
        ("มี18บาท", 18),
        ("18 рублей", 18),
        ("１８", 18),
        ("－１８．５", "-18.5"),
        ("١٬٢٣٤٫٥", "1234.5"),
        ("१८", 18),
        ("๑๘", 18),
        ("𝟏𝟖", 18),
        ("1\ufe0f\u20e38\ufe0f\u20e3", 18),  # Keycaps.
        ("18\u200b\u200e", 18),
        ("1’234’567", 1_234_567),
        ("1\u202f234\u00a0567", 1_234_567),
        ("1 234 567", 1_234_567),
        ("12,34,567", 1_234_567),
        ("１，２３４", 1234),
        ("1.234.567", 1_234_567),
        ("1.234,56", "1234.56"),
        ("1 234,5", "1234.5"),
        ("3,5", "3.5"),
        ("0,125", "0.125"),
        ("1.234", "1.234"),
        ("1,234", 1234),
        ("负5", -5),
        ("温度是-5度", -5),
        ("5元-3元", None),
        ("5小时-3小时", None),
        ("½", "1/2"),
        ("2½ kg", "5/2"),
        ("3⁄4", "3/4"),
        ("18 m²", 18),
        ("18米^2", 18),
        ("1.5e3", 1500),
        ("2E-3", "0.002"),
        (r"1.5\times10^{3}", 1500),
        ("1.5×10³", 1500),
        ("2 x 10^-3", "0.002"),
        ("10^3", 1000),
        ("210^3", None),
        ("18万元", 180_000),
        ("3亿", 300_000_000),
        ("3千克", 3),
        ("5만 원", 50_000),
        (r"1.8 \text{ million}", 1_800_000),
        ("total...18", 18),
        ("sum.18", 18),
        ("v1.18", None),
        (r"\textcolor{red}{18}", 18),
        (r"\num{1234}", 1234),
        ("H2O", None),
        ("x_1", None),
        ("1e1000", None),
    ],
)
def test_a_number_is_read_in_the_languages_of_the_model(text, value):
    assert number(text) == (None if value is None else Fraction(value))


def test_what_was_asked_for_in_millions_may_be_told_in_millions():
    assert same_number("1.8 million", "1800000")
    assert same_number("$2 million", "2")
    assert same_number("18万", "180000")
    assert not same_number("1800000", "1.8")


_GROUPS = {"": r"\1", ",": r"\1,", "'": r"\1'", " ": r"\1 ", "thin": "\\1\u2009", "{,}": r"\1{,}"}
_SCRIPTS = [0x30, 0x660, 0x6F0, 0x966, 0x9E6, 0xE50, 0xFF10, 0x1D7CE]  # The zeros of some.


@given(
    st.decimals(0, 10**12, allow_nan=False, places=2),
    st.sampled_from(list(_GROUPS.values())),
    st.sampled_from(_SCRIPTS),
    st.sampled_from(["", "-", "\u2212", "－", "负"]),
    st.sampled_from(["", "$", r"\$", "USD ", "Rs.", "€", "￥"]),
    st.sampled_from(
        ["", "元", "支笔", " dollars", r"\text{ kg}", "%", r"\%", "円", "개", " रुपये", "€"]
    ),
    st.sampled_from(["", ".", "。", "！", "।", "؟", ")", "**", "_", "」", r"\)"]),
    st.sampled_from(
        ["", "所以共有", "答案：", "So it is ", "**", "_", "合計は", "총", "มี", "x = ", r"\("]
    ),
)
def test_a_number_comes_back_from_every_writing(
    value, group, script, sign, currency, unit, end, before
):
    whole, _, part = str(value).partition(".")
    grouped = re.sub(r"(\d)(?=(\d{3})+$)", group, whole) if group != r"\1" else whole
    digits = grouped + ("." + part if int(part) else "")
    digits = "".join(chr(script + int(c)) if c.isdigit() else c for c in digits)
    text = before + sign + currency + digits + unit + end
    expected = -Fraction(value) if sign else Fraction(value)
    assert number(text) == expected
    assert number(str(last_number("9 and then: " + text))) == expected


@pytest.mark.parametrize(
    "piece",
    [
        *("1", "1,", "111,", "1 ", "111 ", "1.", "111.", "1/", "1e", "-", "$ ", "10^", "10^{", " "),
        *("5^ ", "\\frac{", "\\text{", "\\text{}", "\\hspace{", "^\\circ", "负", "½", "１，", "'"),
        *("\\boxed", "\\boxed{", "答案是", "he answer is", "final answer is $", "_", "#### ", "万"),
    ],
)
def test_a_text_that_went_astray_takes_time_in_proportion(piece):
    """What is quadratic in a text's length would take minutes."""
    text = "5 " + piece * 20_000 + "?"
    for read in (number, last_number, boxed, gold_answer, STYLES["qwen-boxed"].extract["boxed"]):
        read(text)


def test_a_number_of_thousands_of_digits_is_none():
    assert number("9" * 5000) is None  # More digits than Python makes a number of.
    assert number("1e999999999999") is None
    assert number("1" + "e9" * 5000) is None


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
