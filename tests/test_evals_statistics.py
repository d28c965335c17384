# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests by their definitions, in whole numbers and in published examples."""

from fractions import Fraction
from math import comb, sqrt

import pytest

from meshwen.evals.statistics import clustered_interval, mcnemar, wilson_interval


@pytest.mark.parametrize(("correct", "problems"), [(0, 10), (6, 32), (200, 200), (659, 1319)])
def test_wilsons_interval_solves_its_equation(correct, problems):
    z = 1.959963984540054
    share, center = correct / problems, (correct + z * z / 2) / (problems + z * z)
    half = z * sqrt(share * (1 - share) * problems + z * z / 4) / (problems + z * z)
    low, high = wilson_interval(correct, problems)
    assert (low, high) == pytest.approx((center - half, center + half), abs=1e-12)
    assert 0 <= low <= share <= high <= 1


@pytest.mark.parametrize("flips", [(0, 0), (5, 0), (1, 9), (7, 7), (12, 30)])
def test_mcnemars_p_is_that_of_a_fair_coin(flips):
    total, fewer = sum(flips), min(flips)
    one_sided = sum(Fraction(comb(total, i), 2**total) for i in range(fewer + 1))
    assert mcnemar(*flips) == pytest.approx(float(min(1, 2 * one_sided)), rel=1e-9)
    assert mcnemar(*flips) == mcnemar(*reversed(flips))


def test_the_clustered_interval_of_single_answers_is_wilsons_for_one_answer_less():
    clustered = clustered_interval([[True]] * 7 + [[False]] * 4)
    z, share, n = 1.959963984540054, 7 / 11, 10
    for end in clustered:  # Both ends solve Wilson's equation.
        assert abs(share - end) == pytest.approx(z * sqrt(end * (1 - end) / n))


def test_answers_that_are_all_alike_count_as_their_problems():
    low, high = clustered_interval([[True] * 3] * 4)
    assert (low, high) == pytest.approx(wilson_interval(4, 4))
    assert clustered_interval([[False, False]]) == pytest.approx(wilson_interval(0, 1))


def test_repeating_every_answer_tells_nothing_new():
    right = [True, False, True, True, False, True]
    once = clustered_interval([[one] for one in right])
    assert clustered_interval([[one] * 5 for one in right]) == pytest.approx(once)
