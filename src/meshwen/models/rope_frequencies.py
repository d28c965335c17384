# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings: the angle by which each pair of a head's dimensions turns a position.

Plain RoPE is arXiv 2104.09864 (Su et al.), linear scaling is the position interpolation of arXiv
2306.15595 (Chen et al.), YaRN is arXiv 2309.00071 (Peng et al.). Values follow the float32 steps of
transformers, because positions magnify rounding: at position 32768 one ulp (6e-8) is 2e-3 radians.
"""

import math

import numpy as np

from meshwen.models.config import ModelConfig
from meshwen.models.rope_scaling import RopeScaling


def inverse_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Return a model's rotary frequencies, and the factor that scales its cosines and sines.

    Position p turns dimensions (i, i + head_dim/2) of a query or key by p * frequency[i] radians.

    Returns:
        float32 [head_dim/2] in radians per position, and the attention factor: 1.0 unless YaRN.
    """
    wavelengths = _wavelengths(config)
    scaling = config.rope_scaling
    if scaling is None:
        return _ONE / wavelengths, 1.0
    if scaling.rope_type == "linear":
        return _ONE / wavelengths / np.float32(scaling.factor), 1.0
    return _yarn(wavelengths, config, scaling), scaling.cosine_factor


def mean_rotation(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean cosine and sine of each pair's angle over the first positions.

    Returns:
        Two float32 [H/2], the attention factor included.
    """
    frequencies, factor = inverse_frequencies(config)
    count = min(config.context_length, _MEAN_POSITIONS)
    # The sum of exp(i p frequency) for p = 0, ..., count - 1, a geometric series.
    turn = 1j * frequencies.astype(np.float64)
    mean = factor * np.expm1(count * turn) / np.expm1(turn) / count
    return mean.real.astype(np.float32), mean.imag.astype(np.float32)


# Positions that a key's mean is taken over: as many as Qwen2.5 was trained on. With a quarter of
# them bfloat16 keys are as good.
_MEAN_POSITIONS = 32_768
_ONE = np.float32(1.0)


def _wavelengths(config: ModelConfig) -> np.ndarray:
    """Return ``rope_theta ** (2i / head_dim)`` for each pair i: float32 [H/2], positions/radian."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    # In float64, because numpy's float32 power is off by one ulp where PyTorch's is not.
    return np.power(np.float64(config.rope_theta), exponents).astype(np.float32)


def _yarn(wavelengths: np.ndarray, config: ModelConfig, scaling: RopeScaling) -> np.ndarray:
    """Return YaRN's "NTK-by-parts" frequencies, float32 [H/2] (arXiv 2309.00071, section 3.2).

    Pairs that turn more than ``beta_fast`` times in the original context keep their frequency,
    those that turn less than ``beta_slow`` times have it divided by ``factor``; between, a blend.
    """
    low, high = _correction_range(config, scaling)
    pairs = np.arange(config.head_dim // 2, dtype=np.float32)
    ramp = np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1).astype(np.float32)
    kept = _ONE - ramp
    interpolated = _ONE / (np.float32(scaling.factor) * wavelengths)
    return interpolated * (_ONE - kept) + _ONE / wavelengths * kept


def _correction_range(config: ModelConfig, scaling: RopeScaling) -> tuple[float, float]:
    """Return the pair indices between which YaRN blends, by the turns they make in the context."""
    assert scaling.original_max_position_embeddings is not None  # RopeScaling checks it
    context = scaling.original_max_position_embeddings

    def pair_with_turns(turns: float) -> float:
        """Invert ``turns = context / (2 pi theta ** (2 pair / head_dim))``."""
        return (
            config.head_dim
            * math.log(context / (turns * 2 * math.pi))
            / (2 * math.log(config.rope_theta))
        )

    low, high = pair_with_turns(scaling.beta_fast), pair_with_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    return (low, high + 0.001) if low == high else (low, high)
