# SPDX-License-Identifier: Apache-2.0
"""A digest of a checkpoint's weights: equal where two hold the same, wherever they lie."""

from __future__ import annotations

import hashlib
import json
from math import prod
from typing import Any

import numpy as np

from meshwen.checkpoints.base import Checkpoint, TensorSource

_BYTES_AT_A_TIME = 1 << 24
_SAMPLED_BYTES, _SAMPLES = 1 << 20, 16  # of a large tensor


def weights_sha256(checkpoint: Checkpoint) -> str:
    """SHA-256 over every tensor's name, type, shape and values, in the checkpoint's order.

    The mesh has no part in it. Dummy weights are a function of the config, which stands for them.
    """
    digest = hashlib.sha256()
    if checkpoint.format is None:
        # Certificates hold the digest, so its text stays.
        config = json.dumps(checkpoint.config.to_dict(), sort_keys=True, default=str)
        digest.update(f"made-up weights {config}".encode())
    for name, source in checkpoint.tensors.items():
        digest.update(f"{name} {source.dtype} {source.shape}\n".encode())
        _update(digest, source)
    return digest.hexdigest()


def sample_sha256(source: TensorSource) -> str:
    """SHA-256 of a tensor's type, shape and values; of a large one, of some rows all over it."""
    digest = hashlib.sha256(f"{source.name} {source.dtype} {source.shape}\n".encode())
    rows, *columns = source.shape or (1,)
    row_bytes = max(1, prod(columns) * source.dtype.itemsize)
    if rows * row_bytes <= _SAMPLED_BYTES or not source.shape:
        _update(digest, source)
        return digest.hexdigest()
    of_each = max(1, _SAMPLED_BYTES // (_SAMPLES * row_bytes))
    for start in np.linspace(0, rows - of_each, _SAMPLES).astype(int).tolist():
        part = source.read((slice(start, start + of_each),))
        digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return digest.hexdigest()


def _update(digest: Any, source: TensorSource) -> None:
    rows, *columns = source.shape or (1,)
    step = max(1, _BYTES_AT_A_TIME // max(1, prod(columns) * source.dtype.itemsize))
    for start in range(0, rows, step):
        part = source.read((slice(start, start + step),) if source.shape else ())
        digest.update(np.ascontiguousarray(part).view(np.uint8).data)
