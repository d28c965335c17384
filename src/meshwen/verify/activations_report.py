# SPDX-License-Identifier: Apache-2.0
"""What a comparison of activations found, as JSON and in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from meshwen.checkpoints import Checkpoint
from meshwen.common.arguments import one_of
from meshwen.common.units import difference_text
from meshwen.engine.runner import ModelRunner
from meshwen.parallel.mesh import mesh_label
from meshwen.verify.activation_file import Activations
from meshwen.verify.activations import Finding, first_outside, made_errors
from meshwen.verify.certificate import environment
from meshwen.verify.operations import Operation

FORMAT = "meshwen-activations-1"


def activation_report(
    checkpoint: Checkpoint,
    runner: ModelRunner,
    file: Path,
    theirs: Activations,
    found: Sequence[Finding],
) -> dict[str, Any]:
    """The report, of JSON's types alone.

    Args:
        checkpoint: the model's.
        runner: the model that the file was held against.
        file: where the activations were.
        theirs: what was in it.
        found: see `compare_activations`.
    """
    made, model = made_errors(found), runner.model
    first = first_outside(found)
    return {
        "format": FORMAT,
        "ok": first is None and not made,
        "verdict": verdict(found),
        "first_outside": None if first is None else first.operation.key,
        "made": [one.operation.key for one in made],
        "model": checkpoint.name,
        "file": str(file),
        "mesh": mesh_label(runner.plan.mesh),
        "numerics": model.numerics,
        "dtype": model.dtype.name,
        "quantization": model.quantization,
        "layers": runner.config.num_hidden_layers,
        "input_ids": theirs.input_ids.tolist(),
        "activations": [
            {
                "operation": one.operation.key,
                "layer": one.operation.layer,
                "name": one.operation.name,
                "module": one.module,
                "dtype": one.dtype,
                "tolerance": one.tolerance,
                "least_pcc": one.pcc,
                "from_tokens": asdict(one.from_tokens),
                "from_inputs": asdict(one.from_inputs),
                "missing": [operation.key for operation in one.missing],
                "outside": one.outside,
                "made": one in made,
            }
            for one in found
        ],
        "environment": environment(),
    }


def verdict(found: Sequence[Finding]) -> list[str]:
    """The outcome in a few lines: what leaves the tolerance first, and where it was made."""
    first, made = first_outside(found), made_errors(found)
    if first is None and not made:
        return ["every activation is within the tolerance"]
    lines = ["no activation is outside of the tolerance, computed from the tokens"]
    if first is not None:
        lines = [f"first outside of the tolerance: {first.operation} ({_distance(first)})"]
    if not made:
        return [
            *lines,
            "no operation makes an error beyond the tolerance: computed from the file's inputs all "
            "are within it, and small differences add up",
        ]
    sure = [one.operation for one in made if not one.missing]
    if sure:
        lines.append(f"made by: {'; '.join(_places(sure))}")
    for one in made:
        if one.missing:
            others = one_of(_places(one.missing))
            lines.append(f"made by {one.operation}, or by what the file lacks: {others}")
    return lines


def _distance(one: Finding) -> str:
    found = one.from_tokens
    prompt, position, element = found.at
    return (
        f"relative difference {difference_text(found.relative)}, of {one.tolerance:g} allowed; "
        f"PCC {found.pcc:.4f}; prompt {prompt}, position {position}, element {element}"
    )


def _places(operations: Iterable[Operation]) -> list[str]:
    """Operations in words, those of one name in several layers together."""
    by_name: dict[str, list[Operation]] = {}
    for operation in operations:
        by_name.setdefault(operation.name, []).append(operation)
    texts = []
    for name, alike in by_name.items():
        layers = [operation.layer for operation in alike if operation.layer is not None]
        several = f"{name} of layers {_ranges(layers)}"
        texts.append(several if len(layers) > 1 else str(alike[0]))
    return texts


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers that rise, as `0-3, 7`."""
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
