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
from meshwen.common.choices import Numerics
from meshwen.models.placed import PlacedModel
from meshwen.parallel.heads import as_lists
from meshwen.parallel.mesh import MeshSpec, make_mesh
from meshwen.parallel.plan import ParallelPlan
from meshwen.verify.faults import FaultFound, self_test
from meshwen.verify.hlo import Collective, collectives, fingerprint, summary
from meshwen.verify.localise import Parting, Prober, Trace, divergence, parting
from meshwen.verify.mesh_run import MeshRun, Observed
from meshwen.verify.metrics import Difference, compare, sampler_shortfall
from meshwen.verify.promises import (
    broken_by_collectives,
    broken_by_logits,
    broken_by_probe,
    broken_by_sampler,
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
        parting: the first operation with other bits, of whole sequences; None: nowhere.
        logits_sha256: of each prompt's logits, by `whole` and `cached`.
        hlo_sha256: of the decode step's optimised HLO.
        heads: key/value heads of each device, and the query heads of each of them; None: padding.
        seconds: to load, and to compile and run.
        broken: promises that this mesh breaks.
    """

    mesh: str
    numerics: str
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
    parting: str | None
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
        workload: what was asked.
        generated: int32 [prompts, steps], the first mesh's own greedy tokens, by numerics.
        faults: what the self-test found, by numerics and mesh; empty without one.
    """

    rows: tuple[Row, ...]
    workload: Workload
    generated: dict[str, np.ndarray]
    faults: dict[str, list[FaultFound]]


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
    test_self: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Runs the workload on every mesh; one mesh's weights at a time are in memory.

    Args:
        checkpoint: an open one; made-up weights where it has none.
        meshes: the first one is what the others are held against.
        numerics: each for itself.
        dtype: "float32" or "bfloat16".
        workload: without continuations, the first mesh's greedy tokens become these.
        test_self: also put faults in, on the mesh with the most devices.
        note: told of each mesh that is done.

    Raises:
        MeshwenError: a mesh does not exist, or has no exact numerics.
    """
    make_mesh(max(meshes, key=lambda mesh: mesh.devices))  # Simulated devices enough for all.
    models = [
        PlacedModel(checkpoint.config, make_mesh(mesh), jnp.dtype(dtype), kind)
        for kind in numerics
        for mesh in meshes
    ]
    multiple = int(np.lcm.reduce([model.plan.data_devices for model in models]))
    workload = replace(workload, rows_multiple=multiple)
    largest = {
        kind: max(
            (model for model in models if model.numerics == kind),
            key=lambda model: model.plan.model_devices,
        )
        for kind in numerics
    }
    rows: list[Row] = []
    faults: dict[str, list[FaultFound]] = {}
    reference: _Reference | None = None
    generated: dict[str, np.ndarray] = {}
    for number, model in enumerate(models):
        started = time.perf_counter()
        run = MeshRun(model, _params(checkpoint, model), workload)
        loaded = time.perf_counter()
        if model.numerics not in generated:
            generated[model.numerics] = run.generate()
        if workload.continuations is None:
            tokens = generated[model.numerics]
            run.workload = workload = replace(workload, continuations=tokens)
        observed, prober = run.observe(), Prober(run)
        trace = prober.trace(observed.whole)
        if number % len(meshes) == 0:
            reference = _Reference(observed, trace)
        assert reference is not None
        seconds = (loaded - started, time.perf_counter() - loaded)
        rows.append(_row(run, observed, trace, reference, dtype, seconds))
        note(_said(rows[-1]))
        if test_self and model is largest[model.numerics]:
            expected = reference.trace if model.numerics == "exact" else trace
            key = f"{model.numerics} {run.label}"
            first_mesh = reference.observed.whole
            faults[key] = self_test(run, prober, expected, observed.whole, first_mesh)
        del run, prober, observed, trace
        gc.collect()  # Weights and programs, before the next mesh's are made.
    return Outcome(tuple(rows), workload, generated, faults)


def _params(checkpoint: Checkpoint, model: PlacedModel) -> Params:
    if checkpoint.format is None:
        return dummy_params(model.weights)
    return load_params(checkpoint, model.weights)


def _row(
    run: MeshRun,
    observed: Observed,
    trace: Trace,
    reference: _Reference,
    dtype: str,
    seconds: tuple[float, float],
) -> Row:
    model, plan, hlo = run.runner.model, run.plan, run.decode_hlo
    whole = compare(reference.observed.whole, observed.whole)
    cached = compare(reference.observed.cached, observed.cached)
    found = collectives(hlo)
    first = parting(reference.trace, trace)
    agree = int((observed.greedy == reference.observed.greedy).sum())
    shortfall = sampler_shortfall(observed.cached, observed.greedy)
    own = compare(observed.whole, observed.cached)
    kinds = {
        "whole-sequence logits, against the first mesh's": whole,
        "logits through the cache, against the first mesh's": cached,
        "logits through the cache, against whole-sequence ones": own,
    }
    broken = [
        *broken_by_logits(model.numerics, dtype, kinds),
        *broken_by_sampler(model.numerics, dtype, shortfall, agree == observed.greedy.size),
        *broken_by_collectives(model.numerics, model.config.num_hidden_layers, found),
        *broken_by_probe(trace.neutral, trace.devices_agree),
    ]
    local_rows = run.workload.rows // plan.data_devices
    return Row(
        mesh=run.label,
        numerics=model.numerics,
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
        operations=trace.operations,
        operations_equal=tuple((trace.checksums == reference.trace.checksums).tolist()),
        divergence=tuple(divergence(reference.trace, trace)),
        parting=_parting_text(first, cached),
        logits_sha256={
            "whole": [_sha256(logits) for logits in observed.whole],
            "cached": [_sha256(logits) for logits in observed.cached],
        },
        hlo_sha256=fingerprint(hlo),
        heads=_heads(plan),
        seconds=seconds,
        broken=tuple(broken),
    )


def _parting_text(first: Parting | None, cached: Difference) -> str | None:
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


def _said(row: Row) -> str:
    verdict = "; ".join(row.broken) or ("bits equal" if row.bits_equal else "within bounds")
    return f"{row.numerics} {row.mesh}: {verdict} ({sum(row.seconds):.1f} s)"
