# SPDX-License-Identifier: Apache-2.0
"""Answers of word problems: found in a text, read as numbers, and held against the gold answer."""

from __future__ import annotations

import re
from fractions import Fraction

# Of LaTeX: spaces, sizes, units, and signs that say nothing of a number's value.
_LATEX = re.compile(r"\\(?:[\\,;:! ()\[\]]|hspace\*?\s*\{[^{}]*\})|~")
# Commands that are words end where letters do: a digit may follow at once. A blank takes their
# place, so that what stands around them stays apart.
_LATEX_WORD = re.compile(
    r"\\(?:q?quad|enspace|enskip|(?:thin|med|thick|negthin)space|left|right|(?:display|text)style"
    r"|tiny|scriptsize|footnotesize|small|normalsize|[lL]arge|LARGE|[hH]uge|d?approx"
    r"|pounds|euro|cents?|text(?:dollar|euro|sterling)|degree)(?![A-Za-z])"
    r"|\^\s*(?:\{\s*)?\\circ(?![A-Za-z])\s*\}?"
)
_POWER_OF_UNIT = re.compile(r"(?<=[A-Za-z])\s*\^\s*(?:\d|\{\s*\d+\s*\})")
_WRAPPED = re.compile(
    r"\\(?:math(?:rm|bf|it|sf)|boldsymbol|text(?:bf|it|rm)?|mbox|underline)\s*\{([^{}]*)\}"
)
_FRACTION = re.compile(
    r"\\[cdt]?frac\s*(?:\{\s*(-?[\d.,]+)\s*\}|(\d))\s*(?:\{\s*(-?)([\d.,]+)\s*\}|(\d))"
)
# A dash before a number is its sign, unless something that it may lead from stands before it: 3–5.
_DASH = re.compile(r"(?<![\w.)}\]%])(?<!\d\s)\u2013(?=\.?\d)")
_CURRENCY = r"(?:[$€£¥₹]|Rs\.?)"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_FEW = r"\s{0,3}"  # Not any number: a long row of blanks would be searched from each of them.
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>-?)(?:{_CURRENCY}{_FEW})?(?P<sign2>-?)"
    rf"(?:(?P<whole>\d+)\s{_FEW}(?=\d+{_FEW}/{_FEW}\d))?"
    rf"(?P<top>{_DIGITS})(?:{_FEW}/{_FEW}(?P<under>{_DIGITS}))?"
)
# The sign of all that follows: - 18, -(18), $ - 18.
_MINUS_APART = re.compile(rf"^\s*(?:{_CURRENCY}\s*)*-\s*\(?\s*")
# What stands beside a number where there is more to it: another number, or a root, a product, ...
_MORE = re.compile(r"[\d\\]")
_GOLD = re.compile(r"####\s*(.+?)\s*$", re.MULTILINE)


def gold_answer(solution: str) -> str | None:
    """What stands after the last `####` of a GSM8K solution; None where nothing does."""
    found = _GOLD.findall(solution)
    return found[-1] if found else None


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` (or `\fboxed`), braces inside it balanced.

    A box that never closes, as at a limit of tokens, holds all that follows it; one without braces
    all up to the next `$`.
    """
    found = list(re.finditer(r"\\f?boxed\s*(\{?)", text))
    if not found:
        return None
    start = found[-1].end()
    if not found[-1][1]:
        return text[start:].partition("$")[0]
    depth = 1
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at]
    return text[start:]


def number(text: str) -> Fraction | None:
    """The value of an answer that is a number, as people and LaTeX write them.

    Understands thousands commas, currency signs, units and percent signs (both without meaning),
    fractions `a/b` and `\\frac{a}{b}`, decimals, a minus before or after the currency, spaces of
    LaTeX, and a period at the end. Of the sides of an equals sign it is the last that is a number:
    the others are names or sums.

    Returns:
        None where there is no number, or more than one, or arithmetic, which is not done; and where
        a fraction divides by zero.
    """
    values = (_one_number(side) for side in reversed(_plain(text).split("=")))
    return next((value for value in values if value is not None), None)


def _one_number(text: str) -> Fraction | None:
    # A whole number may stand before a fraction: 2 1/2.
    text = _MINUS_APART.sub("-", _FRACTION.sub(r" \3\1\2/\4\5 ", text))
    found = _NUMBER.search(text)
    if not found or _MORE.search(text[: found.start()] + text[found.end() :]):
        return None
    try:
        value = Fraction(found["top"].replace(",", "")) / Fraction(
            (found["under"] or "1").replace(",", "")
        )
        value += int(found["whole"] or 0)
    except (ZeroDivisionError, ValueError):  # Of thousands of digits Python makes no number.
        return None
    return -value if bool(found["sign"]) != bool(found["sign2"]) else value


def last_number(text: str) -> str | None:
    """The last number in a text, as it is written."""
    found = list(_NUMBER.finditer(_plain(text)))
    return found[-1][0].strip() if found else None


def same_number(extracted: str | None, gold: str) -> bool:
    """Whether two answers have the same value; false where one has none."""
    if extracted is None:
        return False
    found, expected = number(extracted), number(gold)
    return found is not None and found == expected


def matches(pattern: re.Pattern[str], text: str) -> list[str]:
    """Of each match the first group that took part; the whole match where there are no groups."""
    found = []
    for match in pattern.finditer(text):
        groups = [group for group in match.groups() if group]
        found.append(groups[0] if groups else match[0])
    return found


def _plain(text: str) -> str:
    """Without what LaTeX adds, and with plain minus signs."""
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\$", "$").replace("\\%", "%")
    text = _LATEX_WORD.sub(" ", _LATEX.sub("", _WRAPPED.sub(r" \1 ", text)))
    return _DASH.sub("-", _POWER_OF_UNIT.sub("", text))
