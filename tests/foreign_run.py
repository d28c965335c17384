# SPDX-License-Identifier: Apache-2.0
"""Activations of a tiny model as another stack would give them: computed in float64, by numpy."""

from pathlib import Path

import numpy as np

import reference
from meshwen.models.config import ModelConfig

PROMPTS = np.array(
    [[5, 81, 7, 200, 33, 12, 9, 250, 3, 17, 4], [90, 44, 8, 1, 1, 2, 3, 5, 8, 13, 21]]
)


def foreign_run(
    config: ModelConfig, weights: dict[str, np.ndarray], prompts: np.ndarray = PROMPTS
) -> dict[str, np.ndarray]:
    """The arrays of a file: input_ids, and in float32 all activations."""
    rows = [reference.activations(weights, config, row.tolist()) for row in prompts]
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return {"input_ids": prompts} | {n: x.astype(np.float32) for n, x in stacked.items()}


def save(folder: Path, arrays: dict[str, np.ndarray], name: str = "dump.npz") -> Path:
    np.savez(folder / name, **arrays)
    return folder / name
