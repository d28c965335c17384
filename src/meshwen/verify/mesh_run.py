# SPDX-License-Identifier: Apache-2.0
"""A model on one mesh, run on a workload in the two ways there are: whole, and with a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array

from meshwen.cache.kv_cache import KVCache
from meshwen.engine import steps
from meshwen.engine.runner import ModelRunner
from meshwen.engine.sampling import SamplerRows, SamplingMethod
from meshwen.engine.sampling_params import SamplingParams
from meshwen.engine.step_inputs import StepInputs, in_parts, step_inputs, tables_in_order
from meshwen.models.parallel_model import ParallelModel
from meshwen.parallel.distributed import gathered, to_host
from meshwen.parallel.mesh import mesh_label
from meshwen.parallel.plan import ParallelPlan
from meshwen.runtime.shape_buckets import step_bucket
from meshwen.verify.workload import Workload
from meshwen.weights.declaration import Params


@dataclass(frozen=True)
class Observed:
    """What a mesh gives for a workload.

    Attributes:
        whole: float32 [prompts, steps, vocab], logits of forward passes without a cache.
        cached: the same from a prefill, and a decode step a token.
        greedy: int32 [prompts, steps], what the sampler takes after each of the tokens fed.
    """

    whole: np.ndarray
    cached: np.ndarray
    greedy: np.ndarray


class MeshRun:
    """A model on a mesh, and the programs that a workload needs.

    Attributes:
        runner: the model.
        workload: what it computes.
    """

    def __init__(self, model: ParallelModel, params: Params, workload: Workload):
        self.runner, plan = ModelRunner(model, params), model.plan
        self.workload = workload
        self._blocks = -(-workload.length // model.backend.block_size)  # of a sequence
        self._tables = tables_in_order(plan.data_devices, self._rows_a_part, self._blocks)
        self._vocab = model.config.vocab_size
        greedy = [SamplingParams()] * workload.rows
        self._method = SamplingMethod.of(greedy, self._vocab)
        self._sampler_rows = jax.tree.map(np.asarray, SamplerRows.of(greedy))
        self._decode = self._compiled_decode()
        self._head = self.runner.compiled(steps.head_step, ("batch embed",), "batch vocab")

    @property
    def plan(self) -> ParallelPlan:
        """How the model lies on the mesh."""
        return self.runner.plan

    @property
    def label(self) -> str:
        """The mesh as a string."""
        return mesh_label(self.plan.mesh)

    @property
    def decode_hlo(self) -> str:
        """The optimised HLO text of the runner's own decode step."""
        return self._decode.as_text() or ""

    def generate(self) -> np.ndarray:
        """The greedy tokens after each prompt: int32 [prompts, steps]."""
        return self._greedy(None)[: len(self.workload.prompts)]

    def observe(self) -> Observed:
        """Runs the workload, with the tokens that it is fed."""
        prompts = len(self.workload.prompts)
        greedy = self._greedy(self.workload.fed())[:prompts]
        return Observed(self._whole(), self._cached()[:prompts], greedy)

    def groups(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The sequences in batches as small as can be: rows, token ids, lengths of each."""
        tokens, lengths = self.workload.sequences()
        size = self.workload.rows_multiple
        return [
            (np.arange(i, i + size, dtype=np.int32), tokens[i : i + size], lengths[i : i + size])
            for i in range(0, self.workload.rows, size)
        ]

    def compared_logits(self, rows: np.ndarray, found: Array) -> list[np.ndarray]:
        """Of a batch's logits [B, T, V padded] those that are compared: [steps, V] a prompt."""
        logits = to_host(found)
        return [
            logits[i, self.workload.compared(row), : self._vocab]
            for i, row in enumerate(rows)
            if row < len(self.workload.prompts)
        ]

    def weight_bytes(self) -> tuple[int, int]:
        """Bytes of weights on the device with the least, and with the most."""
        return self._held("weight", self.runner.params)

    def cache_bytes(self) -> tuple[int, int]:
        """The same of the KV cache of the workload."""
        return self._held("cache", self._empty_cache())

    def _held(self, what: str, arrays: Any) -> tuple[int, int]:
        held = dict.fromkeys(self.plan.mesh.local_devices, 0)
        for array in jax.tree.leaves(arrays):
            for shard in array.addressable_shards:
                held[shard.device] += shard.data.nbytes
        ends = [min(held.values()), max(held.values())]
        every = gathered(f"{what} bytes, {self.runner.model.numerics} {self.label}", ends)
        return min(least for least, _ in every), max(most for _, most in every)

    def _whole(self) -> np.ndarray:
        found: list[np.ndarray] = []
        for rows, tokens, _ in self.groups():
            found += self.compared_logits(rows, self.runner.logits(tokens))
        return np.stack(found)

    def _cached(self) -> np.ndarray:
        """Logits with a cache: float32 [rows, steps, V]."""
        params, fed, lengths = self.runner.params, self.workload.fed(), self.workload.lengths
        inputs, cache, found = self._prompts(), self._empty_cache(), []
        for step in range(self.workload.steps):
            hidden, cache = self.runner.forward(cache, inputs)
            found.append(self._head(params, hidden))
            found[-1].block_until_ready()
            inputs = self._one_each(fed[:, step], lengths + step)
        return np.stack([to_host(out)[:, : self._vocab] for out in found], axis=1)

    def _greedy(self, fed: np.ndarray | None) -> np.ndarray:
        """The sampler's tokens: int32 [rows, steps], fed with others' or (None) with its own."""
        params, lengths, rows = self.runner.params, self.workload.lengths, self._sampler_rows
        sampled, _, cache = self.runner.step(
            self._empty_cache(), self._prompts(), rows, None, self._method
        )
        found = [to_host(sampled.tokens)]
        for step in range(self.workload.steps - 1):
            tokens = found[-1] if fed is None else fed[:, step]
            inputs = self._one_each(tokens, lengths + step)
            sampled, _, cache = self._decode(params, cache, inputs, rows, None)
            found.append(to_host(sampled.tokens))
        return np.stack(found, axis=1)

    def _prompts(self) -> StepInputs:
        """All prompts in one step."""
        w = self.workload
        prompts = [row[:length] for row, length in zip(w.prompt_rows(), w.lengths, strict=True)]
        return self._inputs(prompts, np.zeros_like(w.lengths))

    def _one_each(self, tokens: np.ndarray, positions: np.ndarray) -> StepInputs:
        """A token of each sequence."""
        return self._inputs(tokens[:, None], positions)

    def _inputs(self, tokens: Any, starts: np.ndarray) -> StepInputs:
        size, parts = self._rows_a_part, in_parts(tokens, starts, self.plan.data_devices)
        most = max(sum(len(row.token_ids) for row in part) for part in parts)
        return step_inputs(parts, size, size if most == size else step_bucket(most), self._tables)

    @property
    def _rows_a_part(self) -> int:
        return self.workload.rows // self.plan.data_devices

    def _empty_cache(self) -> KVCache:
        return self.runner.empty_blocks(1 + self._rows_a_part * self._blocks)

    def _compiled_decode(self) -> jax.stages.Compiled:
        row = np.zeros(self.workload.rows, np.int32)
        inputs, rows = self._one_each(row, row), self._sampler_rows
        lowered: jax.stages.Lowered = self.runner.sampling_program.lower(
            self.runner.params, self._empty_cache(), inputs, rows, None, method=self._method
        )
        return lowered.compile()
