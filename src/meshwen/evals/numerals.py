# SPDX-License-Identifier: Apache-2.0
r"""Numbers as people and LaTeX write them, in the languages that Qwen speaks: found, and read.

A text is made plain first: digits of all scripts become ASCII's, what LaTeX adds is taken out. Then
one pattern finds numbers. It takes time in proportion to the text: blanks are bounded, and nothing
that can fail follows what repeats without bound.

Where writings differ between languages, English's is taken: 1.234 is less than two, 1,234 more than
a thousand. Everything else is read as it can only be meant: 1.234,5 and 1.234.567 and 3,5.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_FEW = r"\s{0,3}"  # Not any number: a long row of blanks would be searched from each of them.
_MOST_EXPONENT = 999  # Of ten. What is larger is no answer, and would take memory.

# --- Made plain: Unicode
_FOREIGN = re.compile(r"[^\x00-\x7f]")
_SAME = {
    **dict.fromkeys("\u2212\u2010\u2011\ufe63", "-"),
    **dict.fromkeys("\u2044\u2215", "/"),
    **dict.fromkeys("\u2018\u2019\u02bc", "'"),
    **{"\u066b": ".", "\u066c": ",", "\uffe5": "¥", "\uffe1": "£", "\uffe0": "¢", "\uffe6": "₩"},
    **{"\ufe0f": "", "\u20e3": "", "\uff0c": "\uff0c"},  # Of keycaps; a comma, but of clauses too.
}
# --- Made plain: LaTeX
# Spaces, sizes, units, and signs that say nothing of a number's value.
_LATEX = re.compile(r"\\(?:[\\,;:! ()\[\]]|hspace\*?\s*\{[^{}]*\}|(?:text)?color\s*\{[^{}]*\})|~")
# Of those, what ends a line, a formula or the first half of a range keeps two numbers apart.
_APART = re.compile(r"(?<=[0-9])(?:\\[\\)\]]|~)")
# Commands that are words end where letters do: a digit may follow at once. Blanks take their
# place, two, so that what stands around them stays apart.
_LATEX_WORD = re.compile(
    r"\\(?:q?quad|enspace|enskip|(?:thin|med|thick|negthin)space|left|right|(?:display|text)style"
    r"|tiny|scriptsize|footnotesize|small|normalsize|[lL]arge|LARGE|[hH]uge|d?approx"
    r"|pounds|euro|cents?|text(?:dollar|euro|sterling)|degree)(?![A-Za-z])"
    r"|\^\s*(?:\{\s*)?\\circ(?![A-Za-z])\s*\}?"
)
_POWER_OF_UNIT = re.compile(r"(?<=[^\W\d_])\s*\^\s*(?:\d|\{\s*\d+\s*\})")
_WRAPPED = re.compile(
    r"\\(?:math(?:rm|bf|it|sf)|boldsymbol|text(?:bf|it|rm)?|mbox|underline|operatorname|num)"
    r"\s*\{([^{}]*)\}"
)
_FRACTION = re.compile(
    r"\\[cdt]?frac\s*(?:\{\s*(-?[\d.,]+)\s*\}|(\d))\s*(?:\{\s*(-?)([\d.,]+)\s*\}|(\d))"
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_RAISED = re.compile(r"(?<=10)(⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)")
_POWER_OF_TEN = re.compile(
    rf"(?:(?<=[0-9]){_FEW}(?:\\times|\\cdot|[\u00d7·*xX]){_FEW}|(?<![\w.^]))10{_FEW}\^{_FEW}"
    rf"(?:\{{{_FEW}(-?\d+){_FEW}\}}|(-?\d+))"
)

# --- Found
# Letters that a digit may be part of a name with: v2, H2O. After those of other scripts, which are
# written without blanks or with prefixes, a digit begins a number.
_LETTER = (
    "A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0370-\u052f\u1e00-\u1fff"
)
_BEGINS = rf"(?<![0-9{_LETTER}])(?<![0-9]\.)(?<![0-9{_LETTER})\]}}]_)"
# A minus is a sign, unless it leads from something that stands before it: 10-3, 5元-3元, 3%-5%.
_NOT_FROM = r"(?<![.)\]}%])(?<!\d\w)(?<!\d\w[^\W是为為得到])"
_DASH = re.compile(rf"(?<![{_LETTER}0-9]){_NOT_FROM}(?<!\d\s)\u2013(?=\.?\d)")
_SIGNS = "$¢£¤¥֏؋৲৳฿៛\u20a0-\u20c0\ufdfc"
_CURRENCY = (
    rf"(?:(?:US|HK|NT|AU|CA|NZ|SG|MX|[ACRS])?[{_SIGNS}]|Rs\.?|R[Mp]\.?|"
    r"(?:AED|AUD|BDT|BRL|CAD|CHF|CNY|EGP|EUR|GBP|HKD|IDR|ILS|INR|JPY|KRW|MXN|MYR|NZD|PHP|PKR|PLN"
    r"|RMB|RUB|SAR|SGD|THB|TRY|TWD|USD|VND)\.?)"
)
_MINUS_WORD = re.compile(rf"(?:负|負|マイナス|마이너스)(?={_CURRENCY}?{_FEW}[0-9])")
_COMMAS = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d?(?:,\d{2})+,\d{3})(?!\d)"
_BLANKS = r"(?: \d{3})*(?: 0\d\d| \d{3}(?!-[A-Za-z]))"  # Two numbers: 3 200-gram bags.
_DIGITS = (
    rf"{_COMMAS}(?:\.\d+)?"
    rf"|[1-9]\d{{0,2}}(?:(?:'\d{{3}})+|(?:\uff0c\d{{3}})+|{_BLANKS})(?!\d)(?:\.\d+|,\d{{1,2}}(?!,?\d))?"
    r"|[1-9]\d{0,2}(?:\.\d{3})+,\d{1,2}(?!,?\d)"
    r"|[1-9]\d{0,2}(?:\.\d{3}){2,}(?![\d.])"
    r"|(?<!\d,)(?:\d+,\d{1,2}(?!,?\d)|0,\d+(?![\d,]))"
    rf"|\d+(?:\.\d+)?|(?<![0-9{_LETTER}.)\]])\.\d+"
)
_SCALES = {
    **{"thousand": 3, "million": 6, "billion": 9, "trillion": 12, "lakh": 5, "crore": 7},
    **{
        "千": 3,
        "천": 3,
        "万": 4,
        "萬": 4,
        "만": 4,
        "百万": 6,
        "千万": 7,
        "亿": 8,
        "億": 8,
        "억": 8,
    },
    **{"हज़ार": 3, "लाख": 5, "करोड़": 7},
}
_LONGEST_FIRST = "|".join(sorted(_SCALES, key=len, reverse=True))
_NUMBER = re.compile(
    rf"{_BEGINS}(?P<sign>{_NOT_FROM}--?)?(?:{_CURRENCY}{_FEW}(?P<sign2>-?))?"
    rf"(?:(?P<whole>\d+)\s{_FEW}(?=\d+{_FEW}/{_FEW}\d))?"
    rf"(?P<top>{_DIGITS})(?:[eE](?P<power>[+-]?\d+)(?![0-9{_LETTER}]))?"
    rf"(?:{_FEW}/{_FEW}(?P<under>{_DIGITS}))?"
    rf"(?:{_FEW}(?P<scale>{_LONGEST_FIRST})(?![a-rt-zA-Z克米瓦卡帕焦赫]))?"
)
# The sign of all that follows: - 18, -(18), $ - 18.
_MINUS_APART = re.compile(rf"^\s*(?:{_CURRENCY}\s*)*-\s*\(?\s*")
# What stands beside a number where there is more to it: another number, or a root, a product, ...
_MORE = re.compile(r"[\d\\]")


def number(text: str) -> Fraction | None:
    r"""The value of an answer that is a number.

    Understands digits of all scripts; thousands marked by commas, apostrophes or blanks, by threes
    or as in India; decimal points and commas; currencies, units and percent signs (all without
    meaning); fractions `a/b` and `\frac{a}{b}`; powers of ten; a minus before or after the
    currency; words like million and 万; spaces of LaTeX; and punctuation around it. Of the sides of
    an equals sign it is the last that is a number: the others are names or sums.

    Returns:
        None where there is no number, or more than one, or arithmetic, which is not done; and where
        a fraction divides by zero, or a number has thousands of digits.
    """
    return next(iter(readings(text)), None)


def readings(text: str) -> tuple[Fraction, ...]:
    """The value of `number`, and where a word like million follows, that without it too.

    The question may have asked for millions.
    """
    sides = (_one_number(side) for side in reversed(_plain(text).split("=")))
    return next((values for values in sides if values), ())


def last_number(text: str) -> str | None:
    """The last number in a text, as `number` reads it."""
    found = list(_NUMBER.finditer(_plain(text)))
    return found[-1][0].strip() if found else None


def _one_number(text: str) -> tuple[Fraction, ...]:
    text = _MINUS_APART.sub("-", text)
    found = _NUMBER.search(text)
    if not found or _MORE.search(text[: found.start()] + text[found.end() :]):
        return ()
    try:
        value = _decimal(found["top"]) / _decimal(found["under"] or "1")
        value = (value + int(found["whole"] or 0)) * _ten_to(int(found["power"] or 0))
    except (ZeroDivisionError, ValueError):  # Of thousands of digits Python makes no number.
        return ()
    if len((found["sign"] or "") + (found["sign2"] or "")) % 2:
        value = -value
    scale = found["scale"]
    return (value * _ten_to(_SCALES[scale]), value) if scale else (value,)


def _decimal(digits: str) -> Fraction:
    """The value of digits with their marks."""
    digits = re.sub("[' \uff0c]", "", digits)
    if "," in digits and not re.fullmatch(_COMMAS + r"(?:\.\d+)?", digits):
        return Fraction(digits.replace(".", "").replace(",", "."))
    if digits.count(".") > 1:
        return Fraction(digits.replace(".", ""))
    return Fraction(digits.replace(",", ""))


def _ten_to(power: int) -> Fraction:
    if abs(power) > _MOST_EXPONENT:
        raise ValueError(f"10 to the {power}")
    return Fraction(10) ** power


def _plain(text: str) -> str:
    """With ASCII's digits and signs, and without what LaTeX adds."""
    text = _FOREIGN.sub(lambda found: _ascii(found[0]), text)
    text = text.replace("{,}", ",").replace("\\$", "$").replace("\\%", "%")
    text = _LATEX.sub("", _APART.sub("  ", text))
    for _ in range(3):  # One in another.
        text = _WRAPPED.sub(r" \1 ", text)
    text = _FRACTION.sub(r" \3\1\2/\4\5 ", text)  # A whole number may stand before it: 2 1/2.
    text = _RAISED.sub(lambda found: f"^{{{found[1].translate(_SUPERSCRIPTS)}}}", text)
    text = _POWER_OF_TEN.sub(_with_exponent, _LATEX_WORD.sub("  ", text))
    return _DASH.sub("-", _MINUS_WORD.sub("-", _POWER_OF_UNIT.sub("", text)))


def _ascii(char: str) -> str:
    """What a character means in a number: a digit, a blank, a sign, or itself."""
    if char in _SAME:
        return _SAME[char]
    if (digit := unicodedata.decimal(char, None)) is not None:
        return str(digit)
    if "\uff01" <= char <= "\uff5e":  # The wide forms of ASCII.
        return chr(ord(char) - 0xFEE0)
    kind = unicodedata.category(char)
    if kind == "No" and "\u2044" in (fraction := unicodedata.normalize("NFKC", char)):
        return " " + fraction.replace("\u2044", "/")
    return {"Zs": " ", "Cf": ""}.get(kind, char)


def _with_exponent(found: re.Match[str]) -> str:
    power = found[1] or found[2]
    return f"e{power}" if found[0][0] != "1" else f"1e{power}"
