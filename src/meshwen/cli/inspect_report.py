# SPDX-License-Identifier: Apache-2.0
"""What `meshwen inspect` says, as data: nothing is put on a device, no back end starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import numpy as np

from meshwen.checkpoints import Checkpoint, TensorSource
from meshwen.cli.inspect_sums import sums_report
from meshwen.common.units import percent_more
from meshwen.models.parallel_model import ParallelModel
from meshwen.parallel.heads import as_lists
from meshwen.parallel.mesh import mesh_label
from meshwen.parallel.plan import ParallelPlan
from meshwen.weights.declaration import Part
from meshwen.weights.layout import WeightLayout, WeightTable

_ELEMENTS_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class Stats:
    """Extremes and mean of a tensor's finite values, and how many values are not finite."""

    min: float | None
    max: float | None
    mean: float | None
    nan: int
    inf: int


@dataclass(frozen=True)
class TensorRow:
    """One tensor: as the file holds it, as the model declares it, as a device gets it.

    Attributes:
        name: Hugging Face name.
        shape: shape that the config gives it; None for a tensor that the model has no use for.
        file_shape: shape in the file; None where the file lacks it, or there is no file.
        file_dtype: dtype in the file; of a quantised tensor, the one it is read as.
        quantization: block format in the file, None when not quantised.
        axes: logical axes of `shape`.
        mesh_axes: for each axis, the mesh axes that it is split over.
        device_axes: logical axes in the order kept on the devices.
        device_shape: shape on all devices together, padding and copies included.
        shard_shape: shape of one device's part.
        stats: of the file's values, with --stats.
    """

    name: str
    shape: tuple[int, ...] | None = None
    file_shape: tuple[int, ...] | None = None
    file_dtype: str | None = None
    quantization: str | None = None
    axes: tuple[str, ...] = ()
    mesh_axes: tuple[tuple[str, ...], ...] = ()
    device_axes: tuple[str, ...] = ()
    device_shape: tuple[int, ...] = ()
    shard_shape: tuple[int, ...] = ()
    stats: Stats | None = None


def tensor_rows(
    model: ParallelModel, sources: Mapping[str, TensorSource], pattern: str
) -> list[TensorRow]:
    """Every declared tensor in the order of the forward pass, then what else the file holds.

    Args:
        model: the model on its mesh.
        sources: the checkpoint's tensors; {} when it was opened without weights.
        pattern: keeps the names that this glob matches.
    """
    declared = {weight.declaration.name: weight for weight in model.weights.declared}
    names = dict.fromkeys((*declared, *sources))
    return [
        _row(name, declared.get(name), sources.get(name))
        for name in names
        if fnmatchcase(name, pattern)
    ]


def tensor_stats(source: TensorSource) -> Stats:
    """Reads a tensor a few rows at a time: 16 MB of float32 is the most in memory."""
    if not prod(source.shape):
        return Stats(None, None, None, 0, 0)
    low, high, total, finite, nan, inf = np.inf, -np.inf, 0.0, 0, 0, 0
    rows, *columns = source.shape or (1,)
    step = max(1, _ELEMENTS_AT_A_TIME // prod(columns))
    for start in range(0, rows, step):
        index = (slice(start, start + step),) if source.shape else ()
        values = np.atleast_1d(source.read(index)).astype(np.float32)
        good = values[np.isfinite(values)]
        nan += int(np.isnan(values).sum())
        inf += int(np.isinf(values).sum())
        finite += good.size
        total += float(good.sum(dtype=np.float64))
        low, high = good.min(initial=low), good.max(initial=high)
    if not finite:
        return Stats(None, None, None, nan, inf)
    return Stats(float(low), float(high), total / finite, nan, inf)


def head_report(plan: ParallelPlan) -> dict[str, Any]:
    """The head layout: which heads each device holds, and what padding and copies cost."""
    heads = plan.heads
    with_padding = heads.devices * heads.local_query_heads
    return {
        "devices": heads.devices,
        "data_groups": plan.data_devices,
        "query_heads": heads.query_heads,
        "key_value_heads": heads.key_value_heads,
        "key_value_heads_per_device": heads.local_key_value_heads,
        "query_heads_per_key_value_head": heads.group_size,
        "query_heads_with_padding": with_padding,
        "padding_query_heads": heads.padding_query_heads,
        "query_cost_percent": percent_more(with_padding, heads.query_heads),
        "key_value_copies": heads.key_value_copies,
        "key_value_cost_percent": percent_more(heads.key_value_copies, 1),
        "device_key_value_heads": as_lists(heads.device_key_value_heads()),
        "device_query_heads": as_lists(heads.device_query_heads()),
    }


def weight_report(weights: WeightTable) -> dict[str, Any]:
    """Bytes of the weights, in all and of each part of the model.

    `model` is as in the checkpoint, on no mesh, `per_device` with padding and copies,
    `cost_percent` what these add.
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


def cache_report(model: ParallelModel) -> dict[str, Any]:
    """Bytes of KV cache for each token of a sequence."""
    context_length = model.config.context_length
    whole = model.cache_bytes_per_token(model.config.num_key_value_heads)
    per_device = model.token_bytes
    return {
        "context_length": context_length,
        "model_per_token": whole,
        "per_device_per_token": per_device,
        "per_device_full_context": per_device * context_length,
        "cost_percent": percent_more(per_device * model.plan.model_devices, whole),
    }


def inspection(
    model: ParallelModel, checkpoint: Checkpoint, rows: list[TensorRow]
) -> dict[str, Any]:
    """All of it, as plain JSON values."""
    return {
        "model": checkpoint.name,
        "format": checkpoint.format,
        "config": model.config.to_dict(),
        "parameters": model.weights.parameters,
        "mesh": mesh_label(model.mesh),
        "dtype": str(model.dtype),
        "numerics": model.numerics,
        "quantization": model.quantization,
        "tensors": [_row_dict(row) for row in rows],
        "head_layout": head_report(model.plan),
        "weights": weight_report(model.weights),
        "kv_cache": cache_report(model),
        "sums": sums_report(model.weights),
    }


def _row_dict(row: TensorRow) -> dict[str, Any]:
    return {key: value for key, value in asdict(row).items() if key != "stats" or value is not None}


def _row(name: str, weight: WeightLayout | None, source: TensorSource | None) -> TensorRow:
    row = TensorRow(name)
    if source is not None:
        row = replace(
            row,
            file_shape=source.shape,
            file_dtype=str(source.dtype),
            quantization=source.quantization,
        )
    if weight is not None:
        row = replace(
            row,
            shape=weight.declaration.shape(weight.plan.sizes),
            axes=weight.declaration.axes,
            mesh_axes=tuple(weight.plan.mesh_axes(axis) for axis in weight.declaration.axes),
            device_axes=weight.axes,
            device_shape=weight.shape,
            shard_shape=weight.shard_shape,
        )
    return row
