# SPDX-License-Identifier: Apache-2.0
"""What a conformance check found, as JSON: enough to run it again elsewhere and compare."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np

import meshwen
from meshwen.checkpoints import Checkpoint, TensorSource
from meshwen.errors import MeshwenError
from meshwen.verify.faults import FaultFound
from meshwen.verify.parity import Outcome, Row
from meshwen.verify.promises import BOUNDS, REFERENCE_MARGIN

FORMAT = "meshwen-certificate-1"
_BYTES_AT_A_TIME = 1 << 24

Certificate = dict[str, Any]


def certificate(
    checkpoint: Checkpoint, outcome: Outcome, dtype: str, golden: dict[str, Any] | None
) -> Certificate:
    """All of it, as plain JSON values; the outcome is the same wherever its fields are.

    Args:
        checkpoint: still open, for its weights are hashed.
        outcome: what was found.
        dtype: of weights and products.
        golden: what a comparison with reference outputs found.
    """
    workload = outcome.workload
    assert workload.continuations is not None
    return {
        "format": FORMAT,
        "ok": not broken_promises(outcome, golden),
        "broken": broken_promises(outcome, golden),
        "model": checkpoint.name,
        "weights_sha256": weights_sha256(checkpoint),
        "dtype": dtype,
        "numerics": list(dict.fromkeys(row.numerics for row in outcome.rows)),
        "meshes": list(dict.fromkeys(row.mesh for row in outcome.rows)),
        "prompts": [list(prompt) for prompt in workload.prompts],
        "tokens": workload.continuations.tolist(),
        "generated": outcome.generated.tolist(),
        "layers": checkpoint.config.num_hidden_layers,
        "bounds": BOUNDS,
        "rows": [_row(row) for row in outcome.rows],
        "self_test": {key: [_fault(f) for f in found] for key, found in outcome.faults.items()},
        "golden": golden,
        "environment": environment(),
    }


def broken_promises(outcome: Outcome, golden: dict[str, Any] | None) -> list[str]:
    """Every promise that was broken, with where."""
    broken = [
        f"{row.numerics} {row.mesh}: {promise}" for row in outcome.rows for promise in row.broken
    ]
    for key, found in outcome.faults.items():
        broken += [
            f"self-test, {key}: {f.fault}: put at {f.put_at}, found at {f.found_at or 'no place'}"
            for f in found
            if not f.caught
        ]
    if golden is not None:
        broken += golden["broken"]
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
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def weights_sha256(checkpoint: Checkpoint) -> str:
    """SHA-256 over every tensor's name, type, shape and values, in the checkpoint's order.

    The mesh has no part in it. Made-up weights are a function of the config, which stands for them.
    """
    digest = hashlib.sha256()
    if checkpoint.format is None:
        made_up = json.dumps(checkpoint.config.to_dict(), sort_keys=True, default=str)
        digest.update(f"made-up weights {made_up}".encode())
    for name, source in checkpoint.tensors.items():
        digest.update(f"{name} {source.dtype} {source.shape}\n".encode())
        _update(digest, source)
    return digest.hexdigest()


def read_certificate(path: Path) -> Certificate:
    """A certificate from a file.

    Raises:
        MeshwenError: it cannot be read, or is no certificate.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise MeshwenError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise MeshwenError(f"{path} is not JSON: give a file that verify --json wrote") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise MeshwenError(
            f"{path} is no {FORMAT}: give a file that this version's verify --json wrote"
        )
    missing = {"prompts", "tokens", "meshes", "numerics", "dtype", "rows"} - set(content)
    if missing:
        raise MeshwenError(f"{path} lacks {min(missing)}: it is cut short or was edited")
    return content


def differences(before: Certificate, after: Certificate) -> dict[str, list[str]]:
    """What differs between two runs of the same prompts and tokens, in words.

    Returns:
        "outcome": weights, tokens and logits; [] when the outcome is the same.
        "environment": versions, flags and devices.
    """
    outcome = []
    if before["weights_sha256"] != after["weights_sha256"]:
        outcome.append("weights")
    if before["dtype"] != after["dtype"]:
        outcome.append(f"dtype: {before['dtype']} before, {after['dtype']} now")
    if before["generated"] != after["generated"]:
        outcome.append("tokens: the first mesh generates others")
    earlier = {(row["numerics"], row["mesh"]): row for row in before["rows"]}
    for row in after["rows"]:
        old = earlier.get((row["numerics"], row["mesh"]))
        name = f"{row['numerics']} {row['mesh']}"
        if old is None:
            outcome.append(f"{name} is not in the certificate")
            continue
        kinds = [k for k, v in row["logits_sha256"].items() if old["logits_sha256"][k] != v]
        if kinds:
            outcome.append(f"logits ({' and '.join(kinds)}) of {name}")
    then, now = before["environment"], after["environment"]
    changed = [
        f"{key}: {then.get(key)!r} before, {now.get(key)!r} now"
        for key in dict.fromkeys((*then, *now))
        if then.get(key) != now.get(key)
    ]
    return {"outcome": outcome, "environment": changed}


def golden_comparison(
    source: str, cases: Sequence[Mapping[str, Any]], generated: np.ndarray, dtype: str
) -> dict[str, Any]:
    """The first mesh's tokens against reference outputs.

    In float32 another token breaks a promise, unless the reference's own margin there is known and
    below `REFERENCE_MARGIN`. What follows another token is not compared.

    Args:
        source: what made the reference outputs.
        cases: each with "greedy" tokens and, where known, their "margins".
        generated: int32 [cases, steps].
        dtype: of the generating model.
    """
    said: list[str] = []
    broken: list[str] = []
    for number, (case, found) in enumerate(zip(cases, generated.tolist(), strict=True)):
        expected = case["greedy"][: len(found)]
        step = next((i for i, token in enumerate(expected) if token != found[i]), None)
        if step is None:
            continue
        where = f"prompt {number}, token {step}: {found[step]}, but {expected[step]} in {source}"
        margin = case["margins"][step] if "margins" in case else None
        said.append(where if margin is None else f"{where}, by a margin of {margin:.1e}")
        if dtype == "float32" and (margin is None or margin >= REFERENCE_MARGIN):
            broken.append(said[-1])
    return {
        "source": source,
        "prompts": len(cases),
        "equal": len(cases) - len(said),
        "differences": said,
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


def _fault(found: FaultFound) -> dict[str, Any]:
    return {
        "fault": found.fault,
        "put_at": str(found.put_at),
        "found_at": None if found.found_at is None else str(found.found_at),
        "caught": found.caught,
    }


def _update(digest: Any, source: TensorSource) -> None:
    rows, *columns = source.shape or (1,)
    step = max(1, _BYTES_AT_A_TIME // max(1, prod(columns) * source.dtype.itemsize))
    for start in range(0, rows, step):
        part = source.read((slice(start, start + step),) if source.shape else ())
        digest.update(np.ascontiguousarray(part).view(np.uint8).data)
