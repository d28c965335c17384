# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests by their definitions, in whole numbers and in published examples."""

from fractions import Fraction
from math import comb, sqrt

import pytest

from meshwen.evals.statistics import mcnemar, wilson_interval


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
