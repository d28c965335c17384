# SPDX-License-Identifier: Apache-2.0
"""The first divergence of two runs, by checksums of the bits that every operation gives.

The model is run as it is, with operations that record their results. A checksum is a sum modulo
2^32 of hashes, each of a value's bits and its place: the order of the addition does not matter, so
the same bits have the same checksum on every mesh. Recording stops fusions that there would be
otherwise; whether that changed the logits is checked, not assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from meshwen.models.parallel_model import ParallelModel
from meshwen.ops.hashing import mixed
from meshwen.parallel.distributed import to_host
from meshwen.verify.mesh_run import MeshRun
from meshwen.verify.metrics import bits_equal
from meshwen.verify.operations import Operation, operations
from meshwen.verify.recording import RowHook, recorded
from meshwen.weights.declaration import Params


@dataclass(frozen=True)
class Trace:
    """What the operations of a model gave on one mesh.

    Attributes:
        operations: these, in order.
        checksums: uint32 [operations], over all prompts and positions.
        samples: float32 [prompts, operations but logits, D], at each prompt's last position.
        logits: float32 [prompts, steps, vocab], those that the checksums were taken beside.
        devices_agree: every device that should hold the same activations has the same bits.
        neutral: the logits have the bits that they have without checksums.
    """

    operations: tuple[Operation, ...]
    checksums: np.ndarray
    samples: np.ndarray
    logits: np.ndarray
    devices_agree: bool
    neutral: bool


def first_divergence(expected: Trace, found: Trace) -> Operation | None:
    """The first operation whose bits differ; None where there is none."""
    assert expected.operations == found.operations
    differ = np.flatnonzero(expected.checksums != found.checksums)
    return found.operations[differ[0]] if len(differ) else None


def divergence(expected: Trace, found: Trace) -> list[float]:
    """The largest difference of each operation but logits, in units of its largest value."""
    difference = np.abs(expected.samples - found.samples).max(axis=(0, 2))
    scale = np.abs(expected.samples).max(axis=(0, 2))
    relative = difference / np.where(scale == 0, 1, scale)
    return [float(value) for value in relative]


class Prober:
    """Traces one run's model, with its own weights or with changed ones.

    Args:
        run: the model on its mesh.
        row_hook: changes row-parallel matmuls.
    """

    def __init__(self, run: MeshRun, row_hook: RowHook | None = None):
        self._run = run

        def probe_step(
            params: Params,
            token_ids: Array,
            lengths: Array,
            rows: Array,
            *,
            model: ParallelModel,
        ) -> tuple[Array, Array, Array]:
            return _probe(params, token_ids, lengths, rows, model, row_hook)

        self._probe = run.runner.compiled(
            probe_step,
            ("batch length", "batch", "batch"),
            ("batch vocab", "batch length", "batch length vocab"),
        )

    def trace(self, whole: np.ndarray, params: Params | None = None) -> Trace:
        """Runs the workload's sequences.

        Args:
            whole: float32 [prompts, steps, vocab], the logits without checksums.
            params: other weights; None for the run's own.
        """
        run = self._run
        sums, samples, found = [], [], []
        for rows, tokens, lengths in run.groups():
            weights = run.runner.params if params is None else params
            checksums, sample, out = self._probe(weights, tokens, lengths, rows)
            sums.append(to_host(checksums))
            samples.append(to_host(sample))
            found += run.compared_logits(rows, out)
        totals, agree = _total(np.stack(sums), run.plan.data_devices, run.plan.model_devices)
        logits_found = np.stack(found)
        return Trace(
            operations(run.runner.model.weights),
            totals,
            np.concatenate(samples)[: len(run.workload.prompts)],
            logits_found,
            agree,
            bits_equal(logits_found, whole),
        )


def _total(sums: np.ndarray, data: int, model: int) -> tuple[np.ndarray, bool]:
    """All devices' checksums as one of each operation, and whether copies agree.

    Args:
        sums: uint32 [batches, data, model * operations].
        data: groups of devices with different rows.
        model: devices with the same rows; each has its own part of the logits, the last operation.
    """
    by_device = sums.reshape(len(sums), data, model, -1)
    copies, parts = by_device[..., :-1], by_device[..., -1:]
    agree = bool((copies == copies[:, :, :1]).all())
    whole = np.concatenate([copies[:, :, 0], parts.sum(axis=2, dtype=np.uint32)], axis=-1)
    return whole.sum(axis=(0, 1), dtype=np.uint32), agree


def _probe(
    params: Params,
    token_ids: Array,
    lengths: Array,
    rows: Array,
    model: ParallelModel,
    row_hook: RowHook | None,
) -> tuple[Array, Array, Array]:
    """Checksums uint32 [1, operations], samples float32 [B, operations - 1, D], logits."""
    found = recorded(params, token_ids, model, row_hook=row_hook)
    *values, scores = (found[operation] for operation in operations(model.weights))
    valid = jnp.arange(token_ids.shape[1]) < lengths[:, None]
    sums = [_checksum(value, valid, rows, 0, value.shape[-1]) for value in values]
    first = model.ops.collectives.index() * scores.shape[-1]
    sums.append(_checksum(scores, valid, rows, first, model.config.vocab_size))
    last = lengths[:, None, None] - 1
    samples = [jnp.take_along_axis(value, last, axis=1)[:, 0] for value in values]
    return jnp.stack(sums)[None], jnp.stack(samples, axis=1), scores


def _checksum(values: Array, valid: Array, rows: Array, first: Array | int, size: int) -> Array:
    """The checksum of a device's float32 [B, T, N], whose columns are numbers `first`, ... of all.

    Args:
        values: what to check.
        valid: bool [B, T].
        rows: int32 [B], the rows' numbers.
        first: the number of the first column.
        size: columns from this number on are padding.
    """
    # Hashed: a sum of bits times odd numbers would miss any even number of changed signs.
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    columns = first + jnp.arange(values.shape[2], dtype=jnp.int32)
    place = rows.astype(jnp.uint32)[:, None] * 65_537 + jnp.arange(
        values.shape[1], dtype=jnp.uint32
    )
    place = place[..., None] * jnp.uint32(0x9E3779B1) + columns.astype(jnp.uint32)
    counted = valid[..., None] & (columns < size)
    return jnp.where(counted, mixed(bits ^ mixed(place)), 0).sum(dtype=jnp.uint32)
