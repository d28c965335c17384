# SPDX-License-Identifier: Apache-2.0
"""What a conformance check found, as JSON: enough to run it again elsewhere and compare."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import jax
import numpy as np

import meshwen
from meshwen.checkpoints import Checkpoint
from meshwen.models.registry import architecture
from meshwen.ops.cpu import kernels
from meshwen.ops.numerics.exact import Exact
from meshwen.verify.certificate_file import FORMAT, Certificate, with_hash
from meshwen.verify.faults import Fault
from meshwen.verify.parity import Outcome, Row
from meshwen.verify.promises import REFERENCE_MARGIN, bounds


def certificate(
    checkpoint: Checkpoint,
    outcome: Outcome,
    dtype: str,
    golden: Sequence[Mapping[str, Any]] = (),
    weights_sha256: str | None = None,
    quantization: str | None = None,
) -> Certificate:
    """All of it, as plain JSON values; the outcome is the same wherever its fields are.

    Args:
        checkpoint: what was run.
        outcome: what was found.
        dtype: of weights and matmuls' inputs.
        golden: comparisons with reference outputs.
        weights_sha256: see `meshwen.checkpoints.digest`; None where nobody will read it.
        quantization: "int8", or None.
    """
    workload, config = outcome.workload, checkpoint.config
    declared = architecture(config.model_type).weights(config)
    sums_a_layer = sum(weight.sums_over_devices for weight in declared) // config.num_hidden_layers
    assert workload.continuations is not None
    content = {
        "format": FORMAT,
        "ok": not broken_promises(outcome, golden),
        "broken": broken_promises(outcome, golden),
        "model": checkpoint.name,
        "weights_sha256": weights_sha256,
        "dtype": dtype,
        "quantization": quantization,
        "numerics": list(dict.fromkeys(row.numerics for row in outcome.rows)),
        "meshes": list(dict.fromkeys(row.mesh for row in outcome.rows)),
        "prompts": [list(prompt) for prompt in workload.prompts],
        "tokens": workload.continuations.tolist(),
        "generated": {n: tokens.tolist() for n, tokens in outcome.generated.items()},
        "layers": config.num_hidden_layers,
        "bounds": bounds(sums_a_layer),
        "rows": [_row(row) for row in outcome.rows],
        "self_test": {key: [_fault(f) for f in found] for key, found in outcome.faults.items()},
        "golden": list(golden),
        "environment": environment(),
    }
    return with_hash(content)


def broken_promises(outcome: Outcome, golden: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every promise that was broken, with where."""
    broken = [
        f"{row.numerics} {row.mesh}: {promise}" for row in outcome.rows for promise in row.broken
    ]
    for key, found in outcome.faults.items():
        broken += [
            f"self-test, {key}: {f.name}: injected at {f.operation}, "
            f"found at {f.first_divergence or 'no place'}"
            for f in found
            if not f.caught
        ]
    for comparison in golden:
        broken += comparison["broken"]
    return broken


def environment() -> dict[str, str]:
    """Versions, flags and devices: what may change bits though nothing else did."""
    device = jax.devices()[0]
    return {
        "meshwen": meshwen.__version__,
        "jax": metadata.version("jax"),
        "jaxlib": metadata.version("jaxlib"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "machine": f"{platform.system()} {platform.machine()}",
        "kernels": kernels.label(),
        "exact_version": str(Exact.version),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def differences(before: Certificate, after: Certificate) -> dict[str, list[str]]:
    """What differs between two runs of the same prompts and tokens, in words.

    A mesh that the certificate has not is held against any of its meshes in exact numerics.

    Returns:
        "outcome": weights, tokens and logits; [] when the outcome is the same.
        "environment": versions, flags, devices and compiled programs.
    """
    outcome = []
    if before["weights_sha256"] != after["weights_sha256"]:
        outcome.append("weights")
    for key in ("dtype", "quantization"):  # Older certificates have no quantization, and no key.
        old, new = before.get(key), after.get(key)
        if old != new:
            outcome.append(f"{key}: {old or 'none'} before, {new or 'none'} now")
    for numerics, tokens in after["generated"].items():
        if numerics not in before["numerics"]:
            continue  # Its rows are missing too, or are held against exact ones.
        if before["generated"].get(numerics) != tokens:
            outcome.append(f"tokens: the first mesh generates others in {numerics} numerics")
    then, now = before["environment"], after["environment"]
    changed = [
        f"{key}: {then.get(key)!r} before, {now.get(key)!r} now"
        for key in dict.fromkeys((*then, *now))
        if then.get(key) != now.get(key)
    ]
    changed += _another_kind(before, after)
    if programs := _other_programs(before, after):
        changed.append(f"another compiled decode step on {', '.join(programs)}")
    return {"outcome": outcome + _other_logits(before, after), "environment": changed}


def _another_kind(before: Certificate, after: Certificate) -> list[str]:
    """Says so where exact sums follow another rule: that of the kernels, XLA's, an earlier one."""
    old, new = (
        {row.get("products", "an earlier version") for row in one["rows"] if _is_exact(row)}
        for one in (before, after)
    )
    if not old or not new or old == new:
        return []
    return [
        f"exact numerics: matmuls by {', '.join(old)} before, by {', '.join(new)} now: "
        "another kind of certificate, with other bits"
    ]


def _is_exact(row: dict[str, Any]) -> bool:
    return bool(row["numerics"] == "exact")


def _other_logits(before: Certificate, after: Certificate) -> list[str]:
    earlier = {_name(row): row for row in before["rows"]}
    exact = next(filter(_is_exact, before["rows"]), None)
    found = []
    for row in after["rows"]:
        old = earlier.get(_name(row), exact if _is_exact(row) else None)
        if old is None:
            found.append(f"{_name(row)} is not in the certificate")
            continue
        kinds = [k for k, v in row["logits_sha256"].items() if old["logits_sha256"].get(k) != v]
        if kinds:
            found.append(f"logits ({' and '.join(kinds)}) of {_name(row)}")
    return found


def _other_programs(before: Certificate, after: Certificate) -> list[str]:
    earlier = {_name(row): row["hlo_sha256"] for row in before["rows"]}
    return [
        _name(row)
        for row in after["rows"]
        if earlier.get(_name(row), row["hlo_sha256"]) != row["hlo_sha256"]
    ]


def _name(row: dict[str, Any]) -> str:
    return f"{row['numerics']} {row['mesh']}"


def golden_comparison(
    source: str,
    cases: Sequence[Mapping[str, Any]],
    generated: np.ndarray,
    precision: str,
    numerics: str = "fast",
) -> dict[str, Any]:
    """The first mesh's tokens in some numerics against reference outputs.

    In float32 another token breaks a promise, unless the reference's own margin there is known and
    below `REFERENCE_MARGIN`. What follows another token is not compared.

    Args:
        source: what made the reference outputs.
        cases: each with "greedy" tokens and, where known, their "margins".
        generated: int32 [cases, steps].
        precision: of the generating model's weights: "float32", "bfloat16" or "int8".
        numerics: its numerics.
    """
    differences: list[str] = []
    broken: list[str] = []
    for number, (case, found) in enumerate(zip(cases, generated.tolist(), strict=True)):
        expected = case["greedy"][: len(found)]
        step = next((i for i, token in enumerate(expected) if token != found[i]), None)
        if step is None:
            continue
        where = (
            f"{numerics}, prompt {number}, token {step}: "
            f"{found[step]}, but {expected[step]} in {source}"
        )
        margin = case["margins"][step] if "margins" in case else None
        differences.append(where if margin is None else f"{where}, by a margin of {margin:.1e}")
        if precision == "float32" and (margin is None or margin >= REFERENCE_MARGIN):
            broken.append(differences[-1])
    return {
        "source": source,
        "numerics": numerics,
        "tokens": sum(min(len(case["greedy"]), generated.shape[1]) for case in cases),
        "binding": precision == "float32",
        "prompts": len(cases),
        "equal": len(cases) - len(differences),
        "differences": differences,
        "broken": broken,
    }


def _row(row: Row) -> dict[str, Any]:
    return asdict(row) | {
        "bits_equal": row.bits_equal,
        "collectives": [
            asdict(found) | {"count": count, "sent_bytes": found.sent_bytes}
            for found, count in row.collectives
        ],
    }


def _fault(found: Fault) -> dict[str, Any]:
    place = found.first_divergence
    return {
        "fault": found.name,
        "breaks": list(found.breaks),
        "put_at": str(found.operation),
        "found_at": None if place is None else str(place),
        "caught": found.caught,
    }
