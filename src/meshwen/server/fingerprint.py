# SPDX-License-Identifier: Apache-2.0
"""`system_fingerprint`: a short hash of all that decides the bits of an answer."""

from __future__ import annotations

from typing import Any

from meshwen.causal_lm import CausalLM
from meshwen.checkpoints import Checkpoint
from meshwen.checkpoints.digest import sample_sha256
from meshwen.engine.agreement import digest, environment, instructions
from meshwen.parallel.mesh import mesh_label


def system_fingerprint(checkpoint: Checkpoint, model: CausalLM) -> str:
    """The fingerprint of a model: where two are alike, the same request may get the same bits.

    In exact numerics it does, from whatever mesh, so that the mesh is no part of it. Of large
    tensors some rows are read.

    Args:
        checkpoint: open, that the model was loaded from.
        model: as it runs.
    """
    parallel = model.runner.model
    device = model.mesh.devices.flat[0]
    parts: dict[str, Any] = {
        "config": checkpoint.config.to_dict(),
        "weights": {name: sample_sha256(one) for name, one in checkpoint.tensors.items()},
        "generation_config": dict(model.generation_config),
        "tokenizer": None if model.tokenizer is None else model.tokenizer.content,
        "dtype": str(model.dtype),
        "numerics": parallel.numerics,
        "quantization": parallel.quantization,
        "environment": environment(),
        "device": [device.platform, device.device_kind],
    }
    if device.platform == "cpu":
        parts["instructions"] = instructions()
    if parallel.numerics != "exact":
        parts["mesh"] = mesh_label(model.mesh)
    return f"fp_{digest(parts)}"
