# SPDX-License-Identifier: Apache-2.0
"""How rotary frequencies are stretched beyond the pretraining context: ``config.json``'s RoPE part.

``meshwen.ops.rotary`` computes with it. Linear scaling is arXiv 2306.15595 (Chen et al.), YaRN is
arXiv 2309.00071 (Peng et al.).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from typing_extensions import TypedDict

from meshwen.common.json_files import Finite, shown
from meshwen.errors import MeshwenError

ROPE_TYPES = ("default", "linear", "yarn")
# float32 holds what follows from these; published checkpoints are well inside.
_BETAS = (1e-3, 1e6)
_ATTENTION_FACTORS = (1e-3, 1e3)


class RopeFile(TypedDict, total=False):
    """``rope_scaling`` (transformers 4) or ``rope_parameters`` (5) of a config.json."""

    rope_type: str | None
    type: str | None
    rope_theta: Finite | None
    factor: Finite | None
    original_max_position_embeddings: int | None
    beta_fast: Finite | None
    beta_slow: Finite | None
    attention_factor: Finite | None
    mscale: Finite | None
    mscale_all_dim: Finite | None
    truncate: bool | None
    partial_rotary_factor: Finite | None


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pretraining context.

    ``rope_type`` is ``linear`` or ``yarn``. The fields from ``original_max_position_embeddings`` on
    belong to YaRN. ``attention_factor`` None means: computed from ``factor`` (and ``mscale``).
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        """Raise MeshwenError when the settings contradict themselves."""
        if self.rope_type not in ("linear", "yarn"):
            raise MeshwenError(
                f"rope_type {shown(self.rope_type)} is not supported; supported: "
                f"{', '.join(ROPE_TYPES)}"
            )
        if not 1 <= self.factor < math.inf:
            raise MeshwenError(f"the RoPE scaling factor must be at least 1, found {self.factor}")
        if self.rope_type == "yarn":
            self._check_yarn()

    def _check_yarn(self) -> None:
        context = self.original_max_position_embeddings
        if context is None or not 1 <= context < 2**31:
            raise MeshwenError(f"YaRN needs original_max_position_embeddings, found {context}")
        least, most = _BETAS
        if not least <= self.beta_slow <= self.beta_fast <= most:
            raise MeshwenError(
                f"YaRN needs beta_fast >= beta_slow, from {least:g} to {most:g}, found "
                f"{self.beta_fast} and {self.beta_slow}"
            )
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise MeshwenError(f"attention_factor must be above 0, found {self.attention_factor}")
        for key in ("mscale", "mscale_all_dim"):
            if not (getattr(self, key) or 0) >= 0:
                raise MeshwenError(f"{key} must not be below 0, found {getattr(self, key)}")
        least, most = _ATTENTION_FACTORS
        if not least <= self.cosine_factor <= most:
            raise MeshwenError(
                f"the attention factor (attention_factor, mscale, mscale_all_dim) must be from "
                f"{least:g} to {most:g}, found {self.cosine_factor:g}"
            )

    @property
    def cosine_factor(self) -> float:
        """What scales the cosines and sines: 1.0 unless YaRN.

        That is sqrt(1/t) of arXiv 2309.00071, equation 22: ``0.1 ln(factor) + 1``. ``mscale`` and
        ``mscale_all_dim`` generalise it to a ratio of two such terms, as in DeepSeek's checkpoints;
        both must be given for that.
        """
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    def _temperature(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the ``rope_scaling`` object of config.json: only what the RoPE type knows."""
        if self.rope_type == "linear":
            return {"rope_type": "linear", "factor": self.factor}
        return {key: value for key, value in asdict(self).items() if value is not None}


def read_rope(data: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """Return (rope_theta, scaling) of a config.json.

    As in transformers, a filled rope_scaling wins.

    Raises MeshwenError for a kind of scaling that is not implemented.
    """
    key = "rope_scaling" if data.get("rope_scaling") else "rope_parameters"
    rope: Mapping[str, Any] = data.get(key) or {}
    if nested := [name for name, value in rope.items() if isinstance(value, Mapping)]:
        raise MeshwenError(
            f"{key}.{shown(nested[0])}: RoPE settings per layer type are not supported"
        )
    for source in (rope, data):
        if source.get("partial_rotary_factor") not in (None, 1.0):
            raise MeshwenError("partial_rotary_factor other than 1 is not supported")
    theta = rope.get("rope_theta")
    theta = data.get("rope_theta") if theta is None else theta
    if theta is None:
        raise MeshwenError("rope_theta is missing")
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type == "default":
        return float(theta), None
    if rope_type not in ROPE_TYPES:
        raise MeshwenError(
            f"{key}: rope_type {shown(rope_type)} is not supported; supported: "
            f"{', '.join(ROPE_TYPES)}"
        )
    return float(theta), _scaling(key, rope_type, rope, data, max_positions)


def _scaling(
    key: str, rope_type: str, rope: Mapping[str, Any], data: Mapping[str, Any], max_positions: int
) -> RopeScaling:
    """Read the settings of a kind of scaling, with transformers' defaults."""
    if "factor" not in rope or (rope_type == "linear" and rope["factor"] is None):
        raise MeshwenError(f"{key}.factor is missing")
    if rope_type == "linear":
        return RopeScaling(rope_type="linear", factor=float(rope["factor"]))
    # A model-wide value takes priority, then YaRN's own.
    original = max_positions
    for source in (rope, data):
        if source.get("original_max_position_embeddings") is not None:
            original = source["original_max_position_embeddings"]
    factor = max_positions / max(original, 1) if rope["factor"] is None else rope["factor"]
    floats = ("attention_factor", "mscale", "mscale_all_dim")
    return RopeScaling(
        rope_type="yarn",
        factor=float(factor),
        original_max_position_embeddings=original,
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        truncate=rope.get("truncate") is not False,
        **{name: float(rope[name]) for name in floats if rope.get(name) is not None},
    )
