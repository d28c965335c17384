# SPDX-License-Identifier: Apache-2.0
"""Bytes of a model's weights, from their declaration and the layout alone."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from meshwen.common.units import percent_more
from meshwen.parallel.plan import ParallelPlan
from meshwen.weights.declaration import declared_weights, placed_weights

_PARTS = {
    "embedding": r"embed_tokens",
    "query and output projections": r"[qo]_proj",
    "key and value projections": r"[kv]_proj",
    "MLP": r"mlp\.",
    "norms": r"norm",
    "output head": r"lm_head",
}


def weight_bytes(plan: ParallelPlan, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Bytes of the weights, in all and of each part of the model.

    Args:
        plan: the model on its mesh, which may be abstract.
        dtype: of the weights that are not quantised.

    Returns:
        JSON: `model` (as in the checkpoint, on no mesh), `per_device` (padding and copies
        included), `all_devices`, `cost_percent` (what the mesh adds), and `parts`, the same by name
        of part.
    """
    parts: dict[str, Any] = {part: {"model": 0, "per_device": 0} for part in _PARTS}
    for weight in declared_weights(plan.config):
        shape = weight.shape(plan)
        parts[_part(weight.name)]["model"] += weight.nbytes(shape, plan, dtype)
    for weight in placed_weights(plan):
        shape = weight.shard_shape(plan)[:: -1 if weight.transposed else 1]
        parts[_part(weight.name)]["per_device"] += weight.nbytes(shape, plan, dtype)
    parts = {name: part for name, part in parts.items() if part["model"]}
    for part in parts.values():
        split = part["per_device"] * plan.model_devices
        part["cost_percent"] = percent_more(split, part["model"])
    model = sum(part["model"] for part in parts.values())
    per_device = sum(part["per_device"] for part in parts.values())
    return {
        "model": model,
        "per_device": per_device,
        "all_devices": per_device * plan.model_devices * plan.data_devices,
        "cost_percent": percent_more(per_device * plan.model_devices, model),
        "parts": parts,
    }


def _part(name: str) -> str:
    return next(part for part, pattern in _PARTS.items() if re.search(pattern, name))
