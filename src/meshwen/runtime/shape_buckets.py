# SPDX-License-Identifier: Apache-2.0
"""The few lengths that programs are compiled for."""

from __future__ import annotations

SMALLEST_BUCKET = 16


def shape_bucket(length: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that is at least `length`.

    Args:
        length: what the bucket is to hold.
        smallest: the first of these in the place of 16, a power of two.
    """
    bucket = smallest
    while bucket < length:
        if bucket > 1 and bucket * 3 // 2 >= length:
            return bucket * 3 // 2
        bucket *= 2
    return bucket


def largest_shape_bucket(length: int) -> int:
    """The largest of 16, 24, 32, ... that is at most `length`; 0 where none is."""
    if length < SMALLEST_BUCKET:
        return 0
    half = power_of_two(length + 1) // 2
    return half * 3 // 2 if half * 3 // 2 <= length else half


def step_bucket(tokens: int) -> int:
    """For how many tokens a step of so many is compiled: 1, 2, 4, 8, 16, 24, 32, 48, ..."""
    return power_of_two(tokens) if tokens <= SMALLEST_BUCKET else shape_bucket(tokens)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
