# SPDX-License-Identifier: Apache-2.0
"""Every mesh on the same tokens, held against the first one."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from meshwen.checkpoints import Checkpoint
from meshwen.common.choices import Numerics, Quantization
from meshwen.models.parallel_model import ParallelModel
from meshwen.parallel.heads import as_lists
from meshwen.parallel.mesh import MeshSpec, make_mesh
from meshwen.parallel.plan import ParallelPlan
from meshwen.verify.faults import Fault, self_test
from meshwen.verify.hlo import Collective, collectives, fingerprint, summary
from meshwen.verify.localise import Prober, Trace, divergence, first_divergence
from meshwen.verify.mesh_run import MeshRun, Observed
from meshwen.verify.metrics import Difference, compare, sampler_shortfall
from meshwen.verify.operations import Operation, row_parallel
from meshwen.verify.promises import (
    broken_by_collectives,
    broken_by_logits,
    broken_by_probe,
    broken_by_sampler,
    logit_bounds,
)
from meshwen.verify.workload import Workload
from meshwen.weights.declaration import Params
from meshwen.weights.loading import dummy_params, load_params


@dataclass(frozen=True)
class Row:
    """One mesh, against the first mesh with the same numerics.

    Attributes:
        mesh: as a string.
        numerics: "fast" or "exact".
        products: what multiplies rows with weights: see `Backend.matmul_name`.
        devices: how many.
        data_devices: how many of them have other rows of the batch.
        weight_bytes: weights on the device with the least, and with the most.
        cache_bytes: the same of the KV cache of all prompts.
        whole: logits of forward passes without a cache.
        cached: logits through prefill and decode steps.
        cached_against_whole: this mesh's `cached` logits, held against its own `whole` ones.
        greedy_agree: positions where the decode step's sampler takes the first mesh's token.
        sampler_shortfall: by how much they are less likely, by `cached`, than the likeliest.
        collectives: of a decode step; alike ones together, with how many there are.
        sent_bytes_per_token: what one device sends for one token of one sequence.
        operations: what the checksums are of.
        operations_equal: which of them have the first mesh's bits.
        divergence: relative differences of all operations but the logits.
        first_divergence: the first operation with other bits, of whole sequences; None: nowhere.
        logits_sha256: of each prompt's logits, by `whole` and `cached`.
        hlo_sha256: of the decode step's optimised HLO.
        heads: key/value heads of each device, and the query heads of each of them; None: padding.
        seconds: to load, and to compile and run.
        broken: promises that this mesh breaks.
    """

    mesh: str
    numerics: str
    products: str
    devices: int
    data_devices: int
    weight_bytes: tuple[int, int]
    cache_bytes: tuple[int, int]
    whole: Difference
    cached: Difference
    cached_against_whole: Difference
    greedy_agree: int
    sampler_shortfall: float
    collectives: tuple[tuple[Collective, int], ...]
    sent_bytes_per_token: float
    operations: tuple[str, ...]
    operations_equal: tuple[bool, ...]
    divergence: tuple[float, ...]
    first_divergence: str | None
    logits_sha256: dict[str, list[str]]
    hlo_sha256: str
    heads: dict[str, Any]
    seconds: tuple[float, float]
    broken: tuple[str, ...]

    @property
    def bits_equal(self) -> bool:
        """Whether both kinds of logits have the first mesh's bits."""
        return self.whole.bits_equal and self.cached.bits_equal


@dataclass(frozen=True)
class Outcome:
    """All rows, and the workload with the tokens that were fed.

    Attributes:
        rows: one a mesh and numerics.
        workload: what was computed.
        generated: int32 [prompts, steps], the first mesh's own greedy tokens, by numerics.
        faults: what the self-test found, by numerics and mesh; empty without one.
    """

    rows: tuple[Row, ...]
    workload: Workload
    generated: dict[str, np.ndarray]
    faults: dict[str, list[Fault]]


@dataclass(frozen=True)
class _Reference:
    observed: Observed
    trace: Trace


def verify(
    checkpoint: Checkpoint,
    meshes: Sequence[MeshSpec],
    numerics: Sequence[Numerics],
    dtype: str,
    workload: Workload,
    *,
    quantization: Quantization | None = None,
    test_self: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Runs the workload on every mesh; one mesh's weights at a time are in memory.

    Args:
        checkpoint: an open one; dummy weights where it has none.
        meshes: the first one is what the others are held against.
        numerics: each for itself.
        dtype: "float32" or "bfloat16".
        workload: without continuations, the first mesh's greedy tokens become these.
        quantization: "int8", or None.
        test_self: also inject faults, on the mesh that splits the model over the most devices.
        note: gets a line about each mesh that is done.

    Raises:
        MeshwenError: a mesh does not exist, or has no exact numerics.
    """
    make_mesh(max(meshes, key=lambda mesh: mesh.devices))  # Simulated devices enough for all.
    by_numerics = {
        kind: [
            ParallelModel(checkpoint.config, make_mesh(mesh), jnp.dtype(dtype), kind, quantization)
            for mesh in meshes
        ]
        for kind in numerics
    }
    models = [model for on_meshes in by_numerics.values() for model in on_meshes]
    multiple = int(np.lcm.reduce([model.plan.data_devices for model in models]))
    outcome = Outcome((), replace(workload, rows_multiple=multiple), {}, {})
    for on_meshes in by_numerics.values():
        tested = max(on_meshes, key=lambda model: model.plan.model_devices) if test_self else None
        reference: _Reference | None = None
        for model in on_meshes:
            outcome, reference = _with_mesh(outcome, checkpoint, model, reference, model is tested)
            note(_verdict(outcome.rows[-1]))
            gc.collect()  # Weights and programs, before the next mesh's are made.
    return outcome


def _with_mesh(
    outcome: Outcome,
    checkpoint: Checkpoint,
    model: ParallelModel,
    reference: _Reference | None,
    test_self: bool,
) -> tuple[Outcome, _Reference]:
    """The outcome with one more mesh; without a reference, the mesh becomes it."""
    workload, generated, faults = outcome.workload, outcome.generated, outcome.faults
    started = time.perf_counter()
    run = MeshRun(model, _params(checkpoint, model), workload)
    loaded = time.perf_counter()
    if reference is None:
        generated = {**generated, model.numerics: run.generate()}
    if workload.continuations is None:
        workload = replace(workload, continuations=generated[model.numerics])
        run.workload = workload
    observed, prober = run.observe(), Prober(run)
    trace = prober.trace(observed.whole)
    reference = reference or _Reference(observed, trace)
    seconds = (loaded - started, time.perf_counter() - loaded)
    row = _row(run, observed, trace, reference, seconds)
    if test_self:
        expected = reference.trace if model.numerics == "exact" else trace
        first_mesh = reference.observed.whole
        found = self_test(run, prober, expected, observed.whole, first_mesh)
        faults = {**faults, f"{model.numerics} {run.label}": found}
    return Outcome((*outcome.rows, row), workload, generated, faults), reference


def _params(checkpoint: Checkpoint, model: ParallelModel) -> Params:
    if checkpoint.format is None:
        return dummy_params(model.weights)
    return load_params(checkpoint, model.weights)


def _row(
    run: MeshRun,
    observed: Observed,
    trace: Trace,
    reference: _Reference,
    seconds: tuple[float, float],
) -> Row:
    model, plan, hlo = run.runner.model, run.plan, run.decode_hlo
    numerics, bounds = model.numerics, logit_bounds(model.dtype.name, model.weights.format)
    whole = compare(reference.observed.whole, observed.whole)
    cached = compare(reference.observed.cached, observed.cached)
    found = collectives(hlo)
    first = first_divergence(reference.trace, trace)
    agree = int((observed.greedy == reference.observed.greedy).sum())
    shortfall = sampler_shortfall(observed.cached, observed.greedy)
    own = compare(observed.whole, observed.cached)
    kinds = {
        "whole-sequence logits, against the first mesh's": whole,
        "logits through the cache, against the first mesh's": cached,
        "logits through the cache, against whole-sequence ones": own,
    }
    broken = [
        *broken_by_logits(numerics, bounds, kinds),
        *broken_by_sampler(numerics, bounds, shortfall, agree == observed.greedy.size),
        *broken_by_collectives(numerics, len(row_parallel(model.weights)), found),
        *broken_by_probe(trace.neutral, trace.devices_agree),
    ]
    local_rows = run.workload.rows // plan.data_devices
    return Row(
        mesh=run.label,
        numerics=numerics,
        products=model.matmuls_by,
        devices=plan.mesh.size,
        data_devices=plan.data_devices,
        weight_bytes=run.weight_bytes(),
        cache_bytes=run.cache_bytes(),
        whole=whole,
        cached=cached,
        cached_against_whole=own,
        greedy_agree=agree,
        sampler_shortfall=shortfall,
        collectives=tuple(summary(found)),
        sent_bytes_per_token=sum(c.sent_bytes for c in found) / local_rows,
        operations=tuple(operation.key for operation in trace.operations),
        operations_equal=tuple((trace.checksums == reference.trace.checksums).tolist()),
        divergence=tuple(divergence(reference.trace, trace)),
        first_divergence=_divergence_text(first, cached),
        logits_sha256={
            "whole": [_sha256(logits) for logits in observed.whole],
            "cached": [_sha256(logits) for logits in observed.cached],
        },
        hlo_sha256=fingerprint(hlo),
        heads=_heads(plan),
        seconds=seconds,
        broken=tuple(broken),
    )


def _divergence_text(first: Operation | None, cached: Difference) -> str | None:
    if first is None and not cached.bits_equal:
        return "only through the cache"
    return None if first is None else str(first)


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, "<f4").tobytes()).hexdigest()


def _heads(plan: ParallelPlan) -> dict[str, Any]:
    heads = plan.heads
    return {
        "key_value": as_lists(heads.device_key_value_heads()),
        "query": as_lists(heads.device_query_heads()),
    }


def _verdict(row: Row) -> str:
    verdict = "; ".join(row.broken) or ("bits equal" if row.bits_equal else "within bounds")
    return f"{row.numerics} {row.mesh}: {verdict} ({sum(row.seconds):.1f} s)"
