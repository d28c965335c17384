# SPDX-License-Identifier: Apache-2.0
"""The memory that a model's KV cache may take of its devices."""

from __future__ import annotations

from meshwen.cache.budget import CacheBudget
from meshwen.engine.runner import ModelRunner
from meshwen.errors import MeshwenError
from meshwen.runtime.memory import free_bytes_of_mesh

# Of a device's free memory, what the cache may take; the rest is for what the steps compute.
_CACHE_SHARE = 0.8


def cache_budget(
    runner: ModelRunner, max_num_seqs: int, max_model_len: int | None = None
) -> CacheBudget:
    """What the devices' free memory has room for now that the weights are placed.

    Args:
        runner: the model.
        max_num_seqs: the most sequences that may run at once.
        max_model_len: the most tokens of a sequence; None: the model's context.

    Raises:
        MeshwenError: `max_num_seqs` or `max_model_len` is impossible.
    """
    plan, context = runner.plan, runner.config.context_length
    length = context if max_model_len is None else max_model_len
    if not 2 <= length <= context:
        raise MeshwenError(
            f"max_model_len must be from 2 to the model's context of {context}, not {length}"
        )
    if max_num_seqs < 1:
        raise MeshwenError(f"max_num_seqs must be at least 1, not {max_num_seqs}")
    token_bytes = runner.model.token_bytes
    cache_bytes = int(_CACHE_SHARE * free_bytes_of_mesh(plan.mesh))
    return CacheBudget(max_num_seqs, length, plan.data_devices, token_bytes, cache_bytes)
