# SPDX-License-Identifier: Apache-2.0
"""What is promised of every mesh, and which promises a run broke."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from meshwen.common.choices import QUANTIZATIONS
from meshwen.ops.backend import Backend
from meshwen.ops.formats import Bounds, Format
from meshwen.verify.hlo import Collective
from meshwen.verify.metrics import Difference

# Of weights that are rounded to no less than their dtype. Formats that round more have bounds of
# their own (`Format.bounds`).
# float32: a sum in another order moves logits by 1e-6 of the largest one (measured: 1.3e-6 at most
# for the demo and the 0.5B, on up to 32 devices). The bound leaves room for other back ends and
# deeper models. What stays below it is no fault that a token would show; see the self-test.
# bfloat16: activations are rounded to 8 bits before each product, so another order of a sum can tip
# a rounding, and the tipped value is what all later layers see. Single logits have no useful bound
# then, but the distribution has.
OF_DTYPE = {
    "float32": Bounds(sampler_shortfall=1e-4, max_relative=1e-4),
    "bfloat16": Bounds(sampler_shortfall=2e-2, mean_kl=2e-4, max_kl=1e-2),
}
# float32 implementations that add in other orders may take either of two tokens whose logits are
# this close; the demo's and the 0.5B's logits are between 10 and 40.
REFERENCE_MARGIN = 1e-3
# What a decode step's collectives may be: of each sum over devices (Megatron's, after attention and
# MLP of a layer) and beside the layers. fast: an all-reduce. exact: an all-to-all and an all-gather
# in its place. Both: an all-reduce for the embedding, and the sampler gathers its candidates'
# values and ids.
OF_A_SUM = {"fast": {"all-reduce": 1}, "exact": {"all-to-all": 1, "all-gather": 1}}
BESIDE_LAYERS = {"all-reduce": 1, "all-gather": 2}


def bounds(sums_a_layer: int) -> dict[str, float]:
    """What is promised in numbers, where each layer has so many sums over devices."""
    rounded: dict[str, Bounds] = {"bfloat16": OF_DTYPE["bfloat16"]}
    for word in QUANTIZATIONS:
        rounded[word] = logit_bounds("bfloat16", Backend().format(word))
    return {
        "float32 largest relative logit difference": OF_DTYPE["float32"].max_relative,
        **{f"{name} mean KL divergence": one.mean_kl for name, one in rounded.items()},
        **{
            f"{name} largest KL divergence of a position": one.max_kl
            for name, one in rounded.items()
        },
        "float32 margin of reference outputs that binds": REFERENCE_MARGIN,
        "fast all-reduces a layer": sums_a_layer,
        "exact all-to-alls and all-gathers a layer": sums_a_layer,
        "exact floating-point all-reduces and reduce-scatters": 0,
    }


def logit_bounds(dtype: str, format: Format | None) -> Bounds:
    """The bounds of fast numerics for weights of a dtype, in a format: see `Backend.format`."""
    if format is not None and format.bounds is not None:
        return format.bounds
    return OF_DTYPE[dtype]


def broken_by_logits(numerics: str, bounds: Bounds, kinds: Mapping[str, Difference]) -> list[str]:
    """What logits break, in words.

    Args:
        numerics: "fast" or "exact".
        bounds: of fast numerics: see `logit_bounds`.
        kinds: differences, by what was held against what.
    """
    broken = []
    for kind, difference in kinds.items():
        if not math.isfinite(difference.max_abs):
            broken.append(f"{kind}: not finite")
        elif numerics == "exact":
            if not difference.bits_equal:
                broken.append(f"{kind}: not the same bits")
        elif difference.max_relative > bounds.max_relative:
            broken.append(
                f"{kind}: differences of {difference.max_relative:.1e} of the largest; "
                f"at most {bounds.max_relative:.0e} is promised"
            )
        elif difference.mean_kl > bounds.mean_kl or difference.max_kl > bounds.max_kl:
            broken.append(
                f"{kind}: a mean KL divergence of {difference.mean_kl:.1e}, "
                f"{difference.max_kl:.1e} at a position; at most {bounds.mean_kl:.0e} and "
                f"{bounds.max_kl:.0e} are promised"
            )
    return broken


def broken_by_sampler(
    numerics: str, bounds: Bounds, shortfall: float, all_agree: bool
) -> list[str]:
    """What greedy tokens of the decode step's sampler break, in words.

    Args:
        numerics: "fast" or "exact".
        bounds: of fast numerics: see `logit_bounds`. In exact numerics nothing may be behind.
        shortfall: see `metrics.sampler_shortfall`.
        all_agree: they are the first mesh's.
    """
    broken = []
    most = 0.0 if numerics == "exact" else bounds.sampler_shortfall
    if not shortfall <= most:  # NaN breaks it too.
        broken.append(f"the sampler takes tokens {shortfall:.1e} less likely than the likeliest")
    if numerics == "exact" and not all_agree:
        broken.append("the sampler's greedy tokens are not those of the first mesh")
    return broken


def broken_by_collectives(numerics: str, sums: int, found: Iterable[Collective]) -> list[str]:
    """What the decode step's collectives break, in words.

    Args:
        numerics: "fast" or "exact".
        sums: of the model that are over devices, each the result of a row-parallel matmul.
        found: the collectives.
    """
    found = list(found)
    broken = []
    for kind, count in Counter(c.kind for c in found).items():
        most = OF_A_SUM[numerics].get(kind, 0) * sums + BESIDE_LAYERS.get(kind, 0)
        if count > most:
            promised = f"at most {most} are promised" if most else "none is promised"
            broken.append(f"a decode step has {count} {kind}; {promised}")
    if numerics == "exact":
        broken += [
            f"an exact step has a floating-point {c.kind} ({c.dtype}, {c.group_size} devices)"
            for c in dict.fromkeys(found)
            if c.adds_floats and c.kind in ("all-reduce", "reduce-scatter")
        ]
    return broken


def broken_by_probe(neutral: bool, devices_agree: bool) -> list[str]:
    """What taking checksums brought to light."""
    broken = []
    if not neutral:
        broken.append("taking checksums changed the logits' bits, so no layer can be named")
    if not devices_agree:
        broken.append("devices that should hold the same activations hold different ones")
    return broken
