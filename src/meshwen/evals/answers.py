# SPDX-License-Identifier: Apache-2.0
"""Answers of word problems: found in a text, and held against the gold answer."""

from __future__ import annotations

import re

from meshwen.evals.numerals import readings

_GOLD = re.compile(r"####\s*(\S(?:.*\S)?)\s*$", re.MULTILINE)


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


def same_number(extracted: str | None, gold: str) -> bool:
    """Whether two answers have the same value; false where one has none."""
    if extracted is None:
        return False
    return any(value in readings(extracted) for value in readings(gold)[:1])


def matches(pattern: re.Pattern[str], text: str) -> list[str]:
    """Of each match the first group that took part; the whole match where there are no groups."""
    found = []
    for match in pattern.finditer(text):
        groups = [group for group in match.groups() if group]
        found.append(groups[0] if groups else match[0])
    return found
