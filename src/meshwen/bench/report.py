# SPDX-License-Identifier: Apache-2.0
"""A benchmark's rows: what was measured, and what that is of what the machine can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp

import meshwen
from meshwen.bench.costs import Cost, decode_cost, prefill_cost
from meshwen.bench.measure import Seconds, decode, first_token, peak_bytes
from meshwen.bench.probes import matrix_rate, read_bandwidth
from meshwen.causal_lm import CausalLM
from meshwen.common.choices import Quantization
from meshwen.engine.options import EngineOptions
from meshwen.errors import MeshwenError
from meshwen.ops.backend import XLA
from meshwen.ops.cpu import kernels
from meshwen.parallel.mesh import AnyMesh, mesh_label


@dataclass(frozen=True)
class Machine:
    """What the mesh's devices can do together.

    Attributes:
        bandwidth: bytes read a second.
        rate: operations a second in matmuls with the model's weights.
    """

    bandwidth: float
    rate: float

    @classmethod
    def of(cls, mesh: AnyMesh, dtype: jnp.dtype, quantization: Quantization | None = None) -> Self:
        """Measures it: to be done before a model takes its memory."""
        return cls(read_bandwidth(mesh), matrix_rate(mesh, dtype, quantization))


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        phase: "prefill", from a prompt to the first token, or "decode", a step of the batch.
        batch: sequences.
        length: tokens of each before the step, or of the prompt.
        tokens: prefilled or generated in the measured time.
        seconds: of the measured time.
        cost: what it has to read and to multiply at least.
        share: of the speed that the machine's limits allow, 1 at most but for noise.
    """

    phase: str
    batch: int
    length: int
    tokens: int
    seconds: Seconds
    cost: Cost
    share: float

    @property
    def tokens_per_second(self) -> float:
        """By the median."""
        return self.tokens / self.seconds.median

    @property
    def bytes_per_second(self) -> float:
        """Of what has to be read, by the median."""
        return self.cost.bytes / self.seconds.median

    @property
    def flops_per_second(self) -> float:
        """Of what has to be multiplied, by the median."""
        return self.cost.flops / self.seconds.median


def measure(
    model: CausalLM,
    machine: Machine,
    batches: Sequence[int],
    prompts: Sequence[int],
    steps: int,
    runs: int,
    note: Callable[[str], None],
) -> list[Row]:
    """Measures every prompt length, then every batch at every length.

    Args:
        model: on its mesh.
        machine: what its devices can do.
        batches: sequences that decode together.
        prompts: tokens of a prompt.
        steps: decode steps to take the median of.
        runs: prompts to take the median of.
        note: gets a line about what is measured next.

    Raises:
        MeshwenError: the largest cache does not fit the memory.
    """
    parallel = model.runner.model
    _check_memory(model, max(batches), max(prompts) + steps)

    def row(phase: str, batch: int, length: int, tokens: int, seconds: Seconds, cost: Cost) -> Row:
        share = cost.least_seconds(machine.bandwidth, machine.rate) / seconds.median
        return Row(phase, batch, length, tokens, seconds, cost, share)

    rows = []
    for length in prompts:
        note(f"prefilling a prompt of {length} tokens")
        seconds = first_token(model.engine, length, runs)
        cost = prefill_cost(parallel, length)
        rows.append(row("prefill", 1, length, length, seconds, cost))
    for batch in batches:
        for length in prompts:
            note(f"decoding {batch} sequences from token {length} on")
            seconds = decode(model.runner, batch, length, steps)
            cost = decode_cost(parallel, batch, length + steps // 2)
            rows.append(row("decode", batch, length, batch, seconds, cost))
    return rows


def _check_memory(model: CausalLM, batch: int, length: int) -> None:
    plan = EngineOptions(max_num_seqs=batch, max_model_len=length).cache_plan(model.runner.model)
    if plan.capacity * plan.parts < batch * length:
        raise MeshwenError(
            f"the KV cache of {batch} sequences of {length} tokens does not fit into the memory: "
            "lower --batch or --prompt-len"
        )


def as_dict(
    model: CausalLM, machine: Machine, rows: Sequence[Row], settings: dict[str, Any]
) -> dict[str, Any]:
    """All of a benchmark, as JSON can hold it."""
    devices = list(model.mesh.devices.flat)
    return {
        "format": "meshwen-bench-1",
        "meshwen": meshwen.__version__,
        "jax": jax.__version__,
        "device": devices[0].device_kind,
        "mesh": mesh_label(model.mesh),
        "products": model.runner.model.matmuls_by,
        "compiler": kernels.compiler() if model.runner.model.matmuls_by != XLA else None,
        **settings,
        "machine": asdict(machine),
        "peak_bytes": peak_bytes(devices),
        "rows": [
            asdict(one)
            | {
                "tokens_per_second": one.tokens_per_second,
                "bytes_per_second": one.bytes_per_second,
                "flops_per_second": one.flops_per_second,
            }
            for one in rows
        ],
    }
