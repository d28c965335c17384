# SPDX-License-Identifier: Apache-2.0
"""What is measured of logits, and which of it breaks a promise."""

from dataclasses import replace

import numpy as np
import pytest

from meshwen.ops.cpu.panels import INT8_PANELS, PANELS
from meshwen.ops.formats import Bounds, Format
from meshwen.verify.hlo import Collective
from meshwen.verify.metrics import compare, sampler_shortfall
from meshwen.verify.promises import (
    bounds,
    broken_by_collectives,
    broken_by_logits,
    broken_by_probe,
    broken_by_sampler,
    logit_bounds,
)

BOUNDS = {
    "float32": logit_bounds("float32", None),
    "bfloat16": logit_bounds("bfloat16", PANELS),
    "int8": logit_bounds("float32", INT8_PANELS),
}
LOGITS = np.array([[[4, 1, 0], [0, 2, 1]], [[1, 1.5, 9], [3, 0, 0]]], np.float32)
SAME = compare(LOGITS, LOGITS)


def changed(*at_and_value) -> np.ndarray:
    logits = LOGITS.copy()
    logits[at_and_value[:-1]] = at_and_value[-1]
    return logits


def test_equal_logits_differ_in_nothing():
    assert SAME.bits_equal
    assert (SAME.max_abs, SAME.mean_abs, SAME.mean_kl, SAME.max_relative) == (0, 0, 0, 0)
    assert (SAME.positions, SAME.agree, SAME.proven) == (4, 4, 4)
    assert SAME.first_divergence is None
    assert SAME.smallest_gap == 1


def test_the_sign_of_a_zero_is_a_difference_of_bits_alone():
    found = compare(LOGITS, changed(0, 0, 2, -0.0))
    assert not found.bits_equal
    assert found.max_abs == 0


def test_differences_are_those_of_all_logits():
    found = compare(LOGITS, changed(1, 1, 2, 0.5))
    assert found.max_abs == 0.5
    assert found.mean_abs == pytest.approx(0.5 / 12)
    assert found.max_relative == pytest.approx(0.5 / 9)
    p, q = (np.exp(row) / np.exp(row).sum() for row in ([3.0, 0, 0], [3.0, 0, 0.5]))
    assert found.mean_kl == pytest.approx((p * np.log(p / q)).sum() / 4)


def test_a_token_that_changed_is_counted_and_placed():
    found = compare(LOGITS, changed(1, 0, 0, 10))
    assert (found.agree, found.first_divergence) == (3, (1, 0))


@pytest.mark.parametrize(("logit", "proven"), [(1.4, 4), (1.6, 3), (0.4, 3)])
def test_a_token_is_proven_where_differences_are_below_half_the_gap(logit, proven):
    found = compare(LOGITS, changed(0, 1, 2, logit))  # The gap is 1.
    assert (found.agree, found.proven) == (4, proven)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_a_logit_that_is_no_number_breaks_every_numerics(dtype, numerics):
    found = compare(LOGITS, changed(0, 0, 0, np.nan))
    assert found.proven == 3
    assert len(broken_by_logits(numerics, BOUNDS[dtype], {"cached": found})) == 1
    nowhere_a_number = np.full_like(LOGITS, np.nan)
    found = compare(nowhere_a_number, nowhere_a_number)
    assert found.bits_equal
    assert broken_by_logits(numerics, BOUNDS[dtype], {"cached": found}) == ["cached: not finite"]


def test_exact_numerics_promise_bits():
    other = replace(SAME, bits_equal=False)
    assert broken_by_logits("exact", BOUNDS["float32"], {"cached": SAME}) == []
    assert len(broken_by_logits("exact", BOUNDS["float32"], {"cached": other})) == 1
    assert len(broken_by_logits("exact", BOUNDS["bfloat16"], {"cached": SAME, "whole": other})) == 1


@pytest.mark.parametrize(
    ("precision", "field", "kept", "broken"),
    [
        ("float32", "max_relative", 9e-5, 2e-4),
        ("bfloat16", "mean_kl", 1e-4, 3e-4),
        ("bfloat16", "max_kl", 9e-3, 2e-2),
        ("int8", "mean_kl", 4e-3, 6e-3),
        ("int8", "max_kl", 0.4, 0.6),
    ],
)
def test_fast_numerics_promise_a_bound(precision, field, kept, broken):
    for value, count in ((kept, 0), (broken, 1)):
        difference = replace(SAME, bits_equal=False, **{field: value})
        assert len(broken_by_logits("fast", BOUNDS[precision], {"cached": difference})) == count


def test_a_format_that_rounds_has_bounds_of_its_own_and_states_them():
    class Stated(type(PANELS)):
        bounds = Bounds(sampler_shortfall=0.2, mean_kl=0.1, max_kl=2.0)

    own = logit_bounds("float32", Stated())
    assert (own, Stated().rounds) == (Stated.bounds, True)
    difference = replace(SAME, bits_equal=False, mean_kl=0.09, max_relative=0.5)
    assert broken_by_logits("fast", own, {"cached": difference}) == []
    assert broken_by_sampler("fast", own, 0.19, True) == []
    assert len(broken_by_sampler("fast", own, 0.21, True)) == 1
    assert "bounds" in Format.__abstractmethods__


def test_the_bounds_of_every_precision_are_told():
    told = bounds(2)
    for word in ("bfloat16", "int8"):
        assert told[f"{word} mean KL divergence"] == BOUNDS[word].mean_kl
        assert told[f"{word} largest KL divergence of a position"] == BOUNDS[word].max_kl
    assert told["float32 largest relative logit difference"] == 1e-4


@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_the_sampler_has_to_take_the_likeliest_token(numerics):
    likeliest = LOGITS.argmax(axis=-1)
    assert sampler_shortfall(LOGITS, likeliest) == 0
    assert broken_by_sampler(numerics, BOUNDS["float32"], 0.0, True) == []
    for token in (0, 3, -1):  # One that is in the vocabulary, and two that are not.
        shortfall = sampler_shortfall(LOGITS, np.full_like(likeliest, token))
        assert len(broken_by_sampler(numerics, BOUNDS["float32"], shortfall, True)) == 1
    assert len(broken_by_sampler(numerics, BOUNDS["float32"], float("nan"), True)) == 1
    assert len(broken_by_sampler("exact", BOUNDS["float32"], 0.0, False)) == 1


REDUCE = Collective("all-reduce", "f32", 8, 64, "add", in_layer=True)
INTEGERS = Collective("all-reduce", "s32", 8, 64, "add")
GATHER, EXCHANGE = (Collective(kind, "f32", 8, 64) for kind in ("all-gather", "all-to-all"))


@pytest.mark.parametrize(
    ("numerics", "promised"),
    [
        ("fast", [REDUCE] * 7 + [GATHER] * 2),
        ("exact", [INTEGERS] + [EXCHANGE] * 6 + [GATHER] * 8),
    ],
)
def test_every_collective_that_is_not_promised_breaks_a_promise(numerics, promised):
    assert broken_by_collectives(numerics, 6, promised) == []
    for one in set(promised):
        (message,) = broken_by_collectives(numerics, 6, [*promised, one])
        assert one.kind in message
    other = Collective("collective-permute", "f32", 8, 64)
    assert "none is promised" in broken_by_collectives(numerics, 6, [*promised, other])[0]


@pytest.mark.parametrize("kind", ["all-reduce", "reduce-scatter"])
@pytest.mark.parametrize("reducer", ["add", "multiply", "convert", "unknown"])
def test_exact_numerics_promise_no_sum_of_floats_by_xla(kind, reducer):
    floats = Collective(kind, "bf16", 8, 64, reducer)
    message = broken_by_collectives("exact", 6, [floats])
    assert f"an exact step has a floating-point {kind}" in message[-1]
    for harmless in (replace(floats, dtype="s32"), replace(floats, reducer="maximum")):
        assert not any("floating" in line for line in broken_by_collectives("exact", 6, [harmless]))


def test_checksums_that_change_the_logits_are_no_evidence():
    assert broken_by_probe(neutral=True, devices_agree=True) == []
    assert len(broken_by_probe(neutral=False, devices_agree=False)) == 2
