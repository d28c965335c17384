# SPDX-License-Identifier: Apache-2.0
"""What an accuracy, and a difference of two on the same problems, are worth."""

from __future__ import annotations

from scipy.stats import binomtest


def wilson_interval(correct: int, problems: int) -> tuple[float, float]:
    """The 95% interval of a share of correct answers (E. B. Wilson, 1927).

    Args:
        correct: how many of the problems.
        problems: at least 1.

    Returns:
        Lower and upper end, from 0 to 1.
    """
    interval = binomtest(correct, problems).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p of McNemar's test (Q. McNemar, 1947).

    Args:
        only_first: problems that the first run alone has right.
        only_second: problems that the second run alone has right.

    Returns:
        How likely flips at least this one-sided are where each falls either way alike; 1 where
        there are none.
    """
    flips = only_first + only_second
    return float(binomtest(only_first, flips, 0.5).pvalue) if flips else 1.0
