# SPDX-License-Identifier: Apache-2.0
"""A model on one mesh, run on a workload in the two ways there are: whole, and with a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from meshwen.cache.kv_cache import KVCache
from meshwen.engine import steps
from meshwen.engine.runner import ModelRunner
from meshwen.engine.sampling import SamplerRows, SamplingMethod
from meshwen.engine.sampling_params import SamplingParams
from meshwen.models.parallel_model import ParallelModel
from meshwen.parallel.distributed import gathered, to_host
from meshwen.parallel.mesh import mesh_label
from meshwen.parallel.plan import ParallelPlan
from meshwen.runtime.jax_settings import Jitted
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
        self._vocab = model.config.vocab_size
        greedy = [SamplingParams()] * workload.rows
        self._method = SamplingMethod.of(greedy, self._vocab)
        self._rows = jax.tree.map(np.asarray, SamplerRows.of(greedy))
        self._decode = self._compiled_decode()
        self._head = self.runner.compiled(steps.head_step, ("batch embed",), "batch vocab")
        self._in_rows = Jitted(
            lambda found: jnp.stack(found, axis=1).reshape(workload.rows, -1),
            out_shardings=plan.sharding("batch", "embed"),
        )
        self._decode_logits = self.runner.compiled(
            steps.decode_logits_step,
            (self.runner.cache_axes, "batch", "batch"),
            ("batch length vocab", self.runner.cache_axes),
            donate=(1,),
        )

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
        hidden, cache = self._prefill()
        params, fed, lengths = self.runner.params, self.workload.fed(), self.workload.lengths
        found = [self._head(params, hidden)]
        for step in range(self.workload.steps - 1):
            out, cache = self._decode_logits(params, cache, fed[:, step, None], lengths + step)
            found.append(out[:, 0])
            found[-1].block_until_ready()
        return np.stack([to_host(out)[:, : self._vocab] for out in found], axis=1)

    def _greedy(self, fed: np.ndarray | None) -> np.ndarray:
        """The sampler's tokens: int32 [rows, steps], fed with others' or (None) with its own."""
        hidden, cache = self._prefill()
        params, lengths = self.runner.params, self.workload.lengths
        sampled = self.runner.first(hidden, lengths, self._rows, None, self._method)
        found = [to_host(sampled.tokens)]
        for step in range(self.workload.steps - 1):
            tokens = found[-1] if fed is None else fed[:, step]
            sampled, _, cache = self._decode(
                params, cache, tokens[:, None], lengths + step, self._rows, None
            )
            found.append(to_host(sampled.tokens)[:, 0])
        return np.stack(found, axis=1)

    def _prefill(self) -> tuple[Array, KVCache]:
        w, parts, cache = self.workload, self.plan.data_devices, self._empty_cache()
        prompts, lengths = (
            a.reshape(parts, -1, *a.shape[1:]) for a in (w.prompt_rows(), w.lengths)
        )
        found = []
        for row in range(w.rows // parts):  # As the engine does: one on each part of the batch.
            hidden, cache = self.runner.prefill(
                cache,
                self.runner.empty_hidden(parts),
                prompts[:, row],
                np.full(parts, row, np.int32),
                np.int32(0),
                lengths[:, row],
                w.prompt_length,
            )
            found.append(hidden)
        return self._in_rows(found), cache

    def _empty_cache(self) -> KVCache:
        return self.runner.empty_cache(self.workload.rows, self.workload.length)

    def _compiled_decode(self) -> jax.stages.Compiled:
        row = np.zeros(self.workload.rows, np.int32)
        cache = self._empty_cache()
        lowered: jax.stages.Lowered = self.runner.decode_program.lower(
            self.runner.params, cache, row[:, None], row, self._rows, None, method=self._method
        )
        return lowered.compile()
