# SPDX-License-Identifier: Apache-2.0
"""Bytes of a model's weights, from their declaration and the layout alone."""

from __future__ import annotations

from typing import Any

from meshwen.common.units import percent_more
from meshwen.weights.declaration import Part
from meshwen.weights.layout import WeightTable


def weight_bytes(weights: WeightTable) -> dict[str, Any]:
    """Bytes of the weights, in all and of each part of the model.

    Args:
        weights: of the model on its mesh, which may be abstract.

    Returns:
        JSON: `model` (as in the checkpoint, on no mesh), `per_device` (padding and copies
        included), `all_devices`, `cost_percent` (what the mesh adds), and `parts`, the same by name
        of part.
    """
    plan, dtype = weights.plan, weights.dtype
    parts: dict[str, Any] = {part.value: {"model": 0, "per_device": 0} for part in Part}
    for weight in weights.declared:
        parts[weight.declaration.part]["model"] += weight.model_bytes(dtype)
    for weight in weights.stored:
        parts[weight.declaration.part]["per_device"] += weight.nbytes(dtype)
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
