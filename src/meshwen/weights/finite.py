# SPDX-License-Identifier: Apache-2.0
"""Finds NaN and infinity among weights, at the speed of memory and without a copy of them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from meshwen.errors import MeshwenError

_ELEMENTS_AT_A_TIME = 1 << 18  # What stays in the cache.


def check_finite(values: np.ndarray, dtype: np.dtype[Any], what: str) -> None:
    """Refuses numbers that are not finite, or no longer are once they are rounded to `dtype`.

    One such weight makes NaN of every answer, or zeros of a group of 32 where it is quantised.

    Args:
        values: of any floating-point dtype and shape.
        dtype: bfloat16 or float32.
        what: whose numbers they are, for messages.

    Raises:
        MeshwenError: there is one.
    """
    if _all_below(values, _first_infinite(dtype)):
        return
    if _all_below(values, np.inf):
        raise MeshwenError(
            f"{what} holds numbers that are too large for {dtype}: choose another dtype"
        )
    kind = "infinite numbers" if np.isinf(values).any() else "NaN"
    raise MeshwenError(
        f"{what} holds {kind}, which would make every answer meaningless: download it again, or "
        "convert it anew (numbers above 65504 become infinite in float16); "
        "`meshwen inspect --stats` counts them"
    )


def all_finite(values: np.ndarray) -> bool:
    """Whether floating-point numbers are neither NaN nor infinite."""
    return _all_below(values, np.inf)


def _first_infinite(dtype: np.dtype[Any]) -> float:
    """The least number that rounds to infinity in a dtype: half a step above its largest."""
    info = ml_dtypes.finfo(dtype)
    return float(info.max) * (2 - 2.0 ** -(info.nmant + 1)) / (2 - 2.0**-info.nmant)


def _all_below(values: np.ndarray, bound: float) -> bool:
    """Whether all sizes are below a bound; NaN is not.

    Without their sign, floating-point numbers have the order of their bits, NaN above infinity.
    """
    integer = np.dtype(f"u{values.dtype.itemsize}")
    sizes = integer.type(np.iinfo(integer).max >> 1)
    with np.errstate(over="ignore"):
        limit = np.asarray(bound, np.float64).astype(values.dtype).view(integer)
    rows = np.atleast_1d(values).view(integer)
    step = max(1, _ELEMENTS_AT_A_TIME * len(rows) // max(1, rows.size))
    return all(
        int((rows[start : start + step] & sizes).max(initial=0)) < int(limit)
        for start in range(0, len(rows), step)
    )
