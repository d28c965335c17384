# SPDX-License-Identifier: Apache-2.0
"""How far logits and activations are from a reference; whether that can change a greedy token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Integer

Logits = Float32[np.ndarray, "prompts positions vocab"]


@dataclass(frozen=True)
class Difference:
    """Logits of all positions of all prompts, against the reference's.

    Attributes:
        bits_equal: every logit has the same bits; -0.0 and 0.0 differ.
        max_abs: the largest difference.
        mean_abs: the mean difference.
        max_relative: `max_abs` in units of the largest reference logit.
        mean_kl: mean Kullback-Leibler divergence from the reference, in nats.
        max_kl: the largest of a position.
        positions: how many positions there are.
        agree: at how many of them the likeliest token is the reference's.
        first_divergence: (prompt, position) of the first one where it is not.
        proven: at how many positions no difference could have changed the likeliest token, as
            every one is below half the gap between the reference's two largest logits.
        smallest_gap: the smallest such gap.
    """

    bits_equal: bool
    max_abs: float
    mean_abs: float
    max_relative: float
    mean_kl: float
    max_kl: float
    positions: int
    agree: int
    first_divergence: tuple[int, int] | None
    proven: int
    smallest_gap: float


def compare(reference: Logits, found: Logits) -> Difference:
    """Compares logits, a prompt at a time so that little memory is needed."""
    assert reference.shape == found.shape
    rows = [_compare_prompt(r, f) for r, f in zip(reference, found, strict=True)]
    largest, total, kl, gaps, same = (np.stack(column) for column in zip(*rows, strict=True))
    scale = float(np.abs(reference).max())
    max_abs = float(largest.max())
    kl = np.where(kl < 0, 0, kl)  # Rounding may give -1e-17; NaN stays.
    mean_kl = float(kl.mean())
    apart = np.argwhere(~same)
    return Difference(
        bits_equal=bits_equal(reference, found),
        max_abs=max_abs,
        mean_abs=float(total.sum() / reference.size),
        max_relative=max_abs / scale if scale else max_abs,
        mean_kl=mean_kl,
        max_kl=float(kl.max()),
        positions=same.size,
        agree=int(same.sum()),
        first_divergence=(int(apart[0][0]), int(apart[0][1])) if len(apart) else None,
        proven=int((largest < gaps / 2).sum()),
        smallest_gap=float(gaps.min()),
    )


def _compare_prompt(reference: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of each position: largest and summed difference, KL, top-2 gap, same likeliest token."""
    wide, other = reference.astype(np.float64), found.astype(np.float64)
    distance = np.abs(wide - other)
    log_p, log_q = _log_softmax(wide), _log_softmax(other)
    second, first = np.partition(wide, -2, axis=-1)[:, -2:].T
    return (
        distance.max(axis=-1),
        distance.sum(axis=-1),
        (np.exp(log_p) * (log_p - log_q)).sum(axis=-1),
        first - second,
        wide.argmax(axis=-1) == other.argmax(axis=-1),
    )


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def bits_equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two float32 arrays have the same bits: -0.0 and 0.0 differ."""
    bits, others = (np.ascontiguousarray(x).view(np.uint32) for x in (one, other))
    return bool(np.array_equal(bits, others))


def sampler_shortfall(logits: Logits, tokens: Integer[np.ndarray, "prompts positions"]) -> float:
    """By how much the largest logit exceeds that of a greedy sampler's token, at worst.

    Returns:
        0 where every token is the likeliest, else in units of the largest logit; infinity for a
        token outside of the vocabulary.
    """
    if tokens.min() < 0 or tokens.max() >= logits.shape[-1]:
        return float("inf")
    taken = np.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return float((logits.max(axis=-1) - taken).max() / np.abs(logits).max())


@dataclass(frozen=True)
class Distance:
    """An activation of all prompts and positions, against the reference's.

    Attributes:
        pcc: Pearson correlation of all values.
        max_abs: the largest difference.
        relative: the largest difference at a position in units of the reference's largest value
            there; of the position where it is largest. So a position with large values, as the
            first ones often have, hides no error at another.
        at: (prompt, position, element) of the difference that `relative` states.
    """

    pcc: float
    max_abs: float
    relative: float
    at: tuple[int, int, int]


def distance(
    reference: Float[np.ndarray, "prompts positions size"],
    found: Float[np.ndarray, "prompts positions size"],
) -> Distance:
    """Compares an activation, in float64, a prompt at a time so that little memory is needed."""
    assert reference.shape == found.shape
    with np.errstate(all="ignore"):
        return _distance(reference, found)


def _distance(reference: np.ndarray, found: np.ndarray) -> Distance:
    largest, scale, where = [], [], []
    means = [array.mean(dtype=np.float64) for array in (reference, found)]
    sums = np.zeros(3)  # Of squares and products of what is beyond the means.
    for r, f in zip(reference, found, strict=True):
        wide, other = r.astype(np.float64), f.astype(np.float64)
        scale.append(np.abs(wide).max(axis=-1))
        difference = np.abs(wide - other)
        largest.append(difference.max(axis=-1))
        where.append(difference.argmax(axis=-1))
        del difference
        wide -= means[0]
        other -= means[1]
        sums += [np.vdot(wide, wide), np.vdot(other, other), np.vdot(wide, other)]
    most, of = np.stack(largest), np.stack(scale)
    relative = np.nan_to_num(most / np.where(of == 0, 1, of), nan=np.inf, posinf=np.inf)
    prompt, position = np.unravel_index(relative.argmax(), relative.shape)
    return Distance(
        pcc=_correlation(*sums),
        max_abs=float(most.max()),
        relative=float(relative[prompt, position]),
        at=(int(prompt), int(position), int(where[prompt][position])),
    )


def _correlation(xx: float, yy: float, xy: float) -> float:
    """Pearson's, of sums of squares and products; of a constant: 1 with another one, else 0."""
    if xx == 0 or yy == 0:
        return float(xx == yy)
    return float(min(1.0, max(-1.0, xy / (xx * yy) ** 0.5)))
