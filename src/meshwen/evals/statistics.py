# SPDX-License-Identifier: Apache-2.0
"""What an accuracy, and a difference of two on the same problems, are worth."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from scipy.stats import binomtest, norm


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


def clustered_interval(clusters: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """The 95% interval of a share of correct answers that come in groups which are alike.

    Wilson's, for the number of independent answers that would have as large an error: the error is
    that of the residuals summed by group, with the factor n / (n - 1) for few groups, as
    arXiv 2411.00640 asks of evaluations. Where all groups have the same share, that is no error;
    then the groups are counted.

    Args:
        clusters: whether each answer is correct, a group a problem; at least 1 problem.

    Returns:
        Lower and upper end, from 0 to 1.
    """
    answers, groups = sum(map(len, clusters)), len(clusters)
    share = sum(map(sum, clusters)) / answers
    residuals = (sum(correct - share for correct in group) for group in clusters)
    variance = groups / max(1, groups - 1) * sum(r * r for r in residuals) / answers**2
    independent = share * (1 - share) / variance if variance > 1e-12 else groups
    n, z = min(independent, answers), float(norm.ppf(0.975))
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
    return max(0.0, center - half), min(1.0, center + half)


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
