# SPDX-License-Identifier: Apache-2.0
"""What is promised of every mesh, and which promises a run broke."""

from __future__ import annotations

from collections.abc import Iterable

from meshwen.verify.hlo import Collective
from meshwen.verify.metrics import Difference

# float32: a sum in another order moves logits by 1e-6 of the largest one (measured: 1.3e-6 at most
# for the demo and the 0.5B, on up to 32 devices). The bound leaves room for other back ends and
# deeper models. What stays below it is no fault that a token would show; see the self-test.
FLOAT32_RELATIVE = 1e-4
# bfloat16: activations are rounded to 8 bits before each product, so another order of a sum can tip
# a rounding, and the tipped value is what all later layers see. Single logits have no useful bound
# then, but the distribution has: the mean divergence was 1.7e-5 nats for the 0.5B, 2.7e-5 for the
# demo. The bound leaves room for longer prompts and for ill-conditioned attention.
BFLOAT16_KL = 5e-2
# float32 implementations that add in other orders may take either of two tokens whose logits are
# this close; the demo's and the 0.5B's logits are between 10 and 40.
REFERENCE_MARGIN = 1e-3
# Megatron's scheme: one all-reduce after attention, one after the MLP, one for the embedding.
ALL_REDUCES_PER_LAYER, ALL_REDUCES_BESIDE = 2, 1

BOUNDS = {
    "float32 largest relative logit difference": FLOAT32_RELATIVE,
    "bfloat16 mean KL divergence": BFLOAT16_KL,
    "float32 margin of reference outputs that binds": REFERENCE_MARGIN,
    "fast all-reduces per layer": ALL_REDUCES_PER_LAYER,
    "fast all-reduces beside layers": ALL_REDUCES_BESIDE,
    "exact floating-point all-reduces and reduce-scatters": 0,
}


def broken_by_logits(
    numerics: str, dtype: str, kinds: dict[str, Difference], sampler_agrees: bool
) -> list[str]:
    """What logits break, in words.

    Args:
        numerics: "fast" or "exact".
        dtype: "float32" or "bfloat16".
        kinds: differences, by what was held against what.
        sampler_agrees: the decode step's greedy tokens are the first mesh's.
    """
    broken = []
    for kind, difference in kinds.items():
        if numerics == "exact":
            if not difference.bits_equal:
                broken.append(f"{kind}: not the same bits")
        elif dtype == "float32":
            # Written so that NaN, which is below nothing, breaks it too.
            if not difference.max_relative <= FLOAT32_RELATIVE:
                broken.append(
                    f"{kind}: differences of {difference.max_relative:.1e} of the largest; "
                    f"at most {FLOAT32_RELATIVE:.0e} is promised"
                )
        elif not difference.mean_kl <= BFLOAT16_KL:
            broken.append(
                f"{kind}: a mean KL divergence of {difference.mean_kl:.1e}; "
                f"at most {BFLOAT16_KL:.0e} is promised"
            )
    if numerics == "exact" and not sampler_agrees:
        broken.append("the sampler's greedy tokens are not those of the first mesh")
    return broken


def broken_by_collectives(numerics: str, layers: int, found: Iterable[Collective]) -> list[str]:
    """What the decode step's collectives break, in words."""
    found = list(found)
    if numerics == "exact":
        return [
            f"an exact step has a floating-point {c.kind} ({c.dtype}, {c.group_size} devices)"
            for c in dict.fromkeys(found)
            if c.adds_floats and c.kind in ("all-reduce", "reduce-scatter")
        ]
    count = sum(c.kind == "all-reduce" for c in found)
    most = ALL_REDUCES_PER_LAYER * layers + ALL_REDUCES_BESIDE
    if count <= most:
        return []
    return [f"a decode step has {count} all-reduces; at most {most} are promised"]


def broken_by_probe(neutral: bool, devices_agree: bool) -> list[str]:
    """What taking checksums brought to light."""
    broken = []
    if not neutral:
        broken.append("taking checksums changed the logits' bits, so no layer can be named")
    if not devices_agree:
        broken.append("devices that should hold the same activations hold different ones")
    return broken
