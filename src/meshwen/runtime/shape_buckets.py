# SPDX-License-Identifier: Apache-2.0
"""The few lengths that programs are compiled for."""

from __future__ import annotations

SMALLEST_BUCKET = 16
_LONGEST_CHUNK = 512
# What a device's attention scores, float32 [heads, chunk, positions], may take during prefill: of a
# long prompt the chunks get shorter.
_SCORE_BYTES = 1 << 28


def shape_bucket(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that is at least `length`."""
    bucket = SMALLEST_BUCKET
    while bucket < length:
        if bucket * 3 // 2 >= length:
            return bucket * 3 // 2
        bucket *= 2
    return bucket


def largest_shape_bucket(length: int) -> int:
    """The largest of those that is at most `length`; 0 where none is."""
    if length < SMALLEST_BUCKET:
        return 0
    half = power_of_two(length + 1) // 2
    return half * 3 // 2 if half * 3 // 2 <= length else half


def chunks(length: int, score_heads: int) -> list[int]:
    """Chunks to prefill a prompt in: whole ones, then the smallest shape bucket for the rest.

    They depend on the model, the mesh and the length alone, not on what else there is to do.

    Args:
        length: tokens of the prompt.
        score_heads: query heads of a device whose scores attention writes to memory, padding
            included.
    """
    chunk = _LONGEST_CHUNK
    a_token = 4 * score_heads * shape_bucket(length)  # bytes of scores
    while chunk > SMALLEST_BUCKET and chunk * a_token > _SCORE_BYTES:
        chunk //= 2
    whole, rest = divmod(length, chunk)
    return [chunk] * whole + ([shape_bucket(rest)] if rest else [])


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
