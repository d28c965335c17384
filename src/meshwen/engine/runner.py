# SPDX-License-Identifier: Apache-2.0
"""The compiled steps: one program, run by every device of the mesh on its own part.

Shapes are static. A decode step compiles once for each shape of the cache and sampling method,
prefill once for each length of a chunk and of what it sees; lengths are buckets. Of all these
programs those used last are kept. The cache is donated, so each step updates it in place.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from meshwen.cache.kv_cache import (
    KVCache,
    SequenceCache,
    cache_sharding,
    empty_cache,
    resized,
    without_row,
)
from meshwen.common.choices import Quantization
from meshwen.engine.sampling import Sampled, SamplerRows, SamplingMethod, mark_seen, sample
from meshwen.models.config import ModelConfig
from meshwen.models.qwen2 import Params, hidden_states, logits
from meshwen.ops.contractions import COMPILER_OPTIONS, TensorParallel
from meshwen.ops.cpu import kernels
from meshwen.ops.numerics.exact import EXACT_COMPILER_OPTIONS, ExactTensorParallel
from meshwen.parallel.mesh import AnyMesh, on_cpu
from meshwen.parallel.plan import LEAVES, ParallelPlan
from meshwen.runtime.jax_settings import Program
from meshwen.runtime.programs import ProgramTable, ShapedProgram
from meshwen.weights.declaration import placed_weights, unflatten


class ModelRunner:
    """A model's weights on a mesh, and its compiled steps.

    Attributes:
        plan: how the model lies on the mesh.
        params: the weights, placed as `plan` says.
        dtype: of weights and cached values, and of the inputs of products with weights.
        prefill_program, decode_program: what `prefill` and `decode` call with the weights, jitted;
            to be lowered and looked at.
    """

    def __init__(self, plan: ParallelPlan, params: Params, dtype: jnp.dtype):
        self.plan, self.params, self.dtype = plan, params, dtype
        self.tp = tensor_parallel(plan, dtype)
        weights = placed_weights(plan)
        self._params_spec = unflatten((w.path, w.sharding(plan).spec) for w in weights)
        self._programs = ProgramTable(_CPU_PROGRAMS if on_cpu(plan.mesh) else _PROGRAMS)
        self._logits = self.compiled(_logits_step, ("batch length",), "batch length vocab")
        self.prefill_program = self.compiled(
            partial(_prefill_step, parts=plan.data_devices),
            (_CACHE, "batch embed", "batch length", "batch", "", "batch"),
            ("batch embed", _CACHE),
            static="slots",
            donate=(1, 2),
        )
        self._first = self.compiled(
            _first_step, ("batch embed", "batch", _ROWS, "batch vocab"), "batch", static="method"
        )
        self.decode_program = self.compiled(
            _decode_step,
            (_CACHE, "batch", "batch", _ROWS, "batch vocab"),
            ("batch", "batch vocab", _CACHE),
            static="method",
            donate=(1, 5),
        )
        self._empty_cache = ShapedProgram(
            self._programs, lambda: Program(partial(empty_cache, plan), static_argnums=(0, 1, 2))
        )
        self._resized = ShapedProgram(
            self._programs,
            lambda: Program(
                partial(resized, plan),
                static_argnames=("batch", "slots"),
                out_shardings=cache_sharding(plan),
            ),
        )
        self._without_row = ShapedProgram(
            self._programs,
            lambda: Program(without_row, donate_argnums=0, out_shardings=cache_sharding(plan)),
        )
        self._empty_hidden = ShapedProgram(
            self._programs,
            lambda: Program(
                lambda batch: jnp.zeros((batch, plan.config.hidden_size), jnp.float32),
                static_argnums=0,
                out_shardings=plan.sharding("batch", "embed"),
            ),
        )

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """A cache for `batch` sequences (a multiple of the plan's data devices)."""
        return self._empty_cache(batch, length, self.dtype)

    def resized(self, cache: KVCache, batch: int, length: int) -> KVCache:
        """The cache with more sequences (on each part of the batch) and slots, the new ones empty.

        It is not donated: both exist for a moment.
        """
        # A layer compiles sooner than all.
        return tuple(self._resized(layer, batch=batch, slots=length) for layer in cache)

    def without_row(self, cache: KVCache, row: int) -> KVCache:
        """The cache, donated, with a row as in an empty one."""
        return self._without_row(cache, np.int32(row))

    def empty_hidden(self, batch: int) -> Array:
        """What `prefill` starts from: float32 [B, D]."""
        return self._empty_hidden(batch)

    def logits(self, token_ids: ArrayLike) -> Array:
        """Logits of whole sequences, without a cache.

        Args:
            token_ids: int32 [B, T]; padding stands behind a sequence, where no token sees it.

        Returns:
            float32 [B, T, V padded to the mesh], the vocabulary split over the devices.
        """
        return self._logits(self.params, token_ids)

    def prefill(
        self,
        cache: KVCache,
        hidden: Array,
        token_ids: ArrayLike,
        rows: ArrayLike,
        start: ArrayLike,
        lengths: ArrayLike,
        slots: int,
    ) -> tuple[Array, KVCache]:
        """Reads a chunk of a prompt into the cache, on each of the P parts of the batch.

        One prompt at a time: one of usual length keeps a device busy by itself, and nothing is
        padded to the longest of several.

        Args:
            cache: donated.
            hidden: float32 [P, D], donated; replaced where a prompt ends in this chunk.
            token_ids: int32 [P, T]; anything beyond a prompt's end.
            rows: int32 [P], the prompt's row among those of its part of the batch.
            start: int32 [], the position of the chunk.
            lengths: int32 [P], the prompts' lengths. Where one is not beyond `start`, nothing is
                written.
            slots: at least start + T. XLA reads so many slots of the cache, and compiles for
                each number; a kernel for the attention reads what is seen.

        Returns:
            The final hidden states of the prompts' last tokens so far, and the cache.
        """
        if self.tp.kernels:
            slots = cache[0].values.shape[2]
        return self.prefill_program(
            self.params,
            cache,
            hidden,
            token_ids,
            rows,
            start,
            lengths,
            slots=slots,
        )

    def first(
        self,
        hidden: Array,
        positions: ArrayLike,
        rows: SamplerRows,
        seen: ArrayLike | None,
        method: SamplingMethod,
    ) -> Sampled:
        """The token after each prompt, from what `prefill` returned; see `decode`."""
        return self._first(self.params, hidden, positions, rows, seen, method=method)

    def decode(
        self,
        cache: KVCache,
        tokens: ArrayLike,
        positions: ArrayLike,
        rows: SamplerRows,
        seen: ArrayLike | None,
        method: SamplingMethod,
    ) -> tuple[Sampled, Array | None, KVCache]:
        """One step of every sequence.

        Args:
            cache: donated.
            tokens: int32 [B, T], each sequence's newest token, and guesses of what follows it.
            positions: int32 [B], of the newest tokens; all T are within the cache.
            rows: sampling parameters.
            seen: bool [B, V padded], donated: tokens of the sequences before `tokens`, whose T is
                1; None when `method` has no repetition penalty.
            method: what the batch needs of the sampler.

        Returns:
            The tokens that follow each of the T, [B, T], `seen` with `tokens`, and the cache.
        """
        return self.decode_program(self.params, cache, tokens, positions, rows, seen, method=method)

    def compiled(
        self,
        step: Callable[..., Any],
        in_axes: tuple[Any, ...],
        out_axes: Any,
        static: str | None = None,
        donate: tuple[int, ...] = (),
    ) -> ShapedProgram:
        """`step(params, ...)`, compiled to be run by each device on its part.

        Args:
            step: a function of the weights, arrays, and keywords `config`, `tp` and `static`.
            in_axes: logical axes of the arrays, "batch vocab", or of all arrays of a pytree.
            out_axes: those of the results.
            static: the keyword whose every value is compiled for itself.
            donate: positions of arguments whose memory the results may take.
        """

        # Not `self`: in a cycle with its programs, the weights would outlive their last use.
        plan, tp = self.plan, self.tp
        in_specs = (self._params_spec, *_specs(plan, in_axes))
        out_specs = _specs(plan, out_axes)

        def make() -> Program:
            def program(params: Params, *arguments: Any, **options: Any) -> Any:
                mapped = jax.shard_map(
                    partial(step, config=plan.config, tp=tp, **options),
                    mesh=plan.mesh,
                    in_specs=in_specs,
                    out_specs=out_specs,
                    check_vma=False,
                )
                return mapped(params, *arguments)

            program.__name__ = getattr(step, "func", step).__name__.strip("_")
            options = _compiler_options(plan)
            return Program(
                program, static_argnames=static, donate_argnums=donate, compiler_options=options
            )

        return ShapedProgram(self._programs, make)


_CACHE = "batch heads"
_ROWS: Any = SamplerRows._make([*["batch"] * 7, *["batch vocab"] * 2])

# Programs that are kept. One of a CPU takes up to 630 memory maps and 53 MB (24 layers, 8 devices).
_CPU_PROGRAMS = 48
_PROGRAMS = 512

# XLA's CPU back end takes 8 times as long for a bfloat16 product of one row as for one of eight
# rows (all layers of Qwen2.5-0.5B: 485 against 59 ms with jax 0.10, 831 against 60 with 0.12).
_CPU_BFLOAT16_ROWS = 8

XLA = "xla"


def _compiler_options(plan: ParallelPlan) -> dict[str, str | bool] | None:
    if not on_cpu(plan.mesh):
        return None
    return EXACT_COMPILER_OPTIONS if plan.exact else COMPILER_OPTIONS


def _specs(plan: ParallelPlan, axes: Any) -> Any:
    """The partition spec of logical axes, or of each of several arrays' in a pytree."""
    return jax.tree.map(lambda names: plan.spec(*names.split()), axes)


def tensor_parallel(plan: ParallelPlan, dtype: jnp.dtype) -> TensorParallel:
    """The contractions of a plan, with weights of `dtype`."""
    own = plan.kernels
    alone = own and _fills_cores(plan.mesh)
    if plan.exact:
        leaves = LEAVES // plan.model_devices
        return ExactTensorParallel(
            plan.model_axes, kernels=own, alone=alone, vocabulary_leaves=leaves
        )
    rows = _CPU_BFLOAT16_ROWS if on_cpu(plan.mesh) and dtype == jnp.bfloat16 else 1
    return TensorParallel(plan.model_axes, rows, own, alone)


def products(mesh: AnyMesh, dtype: jnp.dtype, quantization: Quantization | None = None) -> str:
    """What multiplies rows with weights of `dtype` on a mesh: "xla", or the name of a kernel."""
    name = kernels.int8_name() if quantization else kernels.name(dtype)
    return (name if on_cpu(mesh) else None) or XLA


def _fills_cores(mesh: AnyMesh) -> bool:
    """Whether this process has as many of the mesh's devices as it may use cores."""
    here = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    affinity = getattr(os, "sched_getaffinity", None)  # Not on macOS.
    return len(here) >= (len(affinity(0)) if affinity else os.cpu_count() or 1)


def _logits_step(
    params: Params, token_ids: Array, *, config: ModelConfig, tp: TensorParallel
) -> Array:
    B, T = token_ids.shape
    x, _ = hidden_states(params, token_ids, jnp.zeros(B, jnp.int32), None, T, config, tp)
    return logits(params, x, tp)


def _prefill_step(
    params: Params,
    cache: KVCache,
    hidden: Array,
    token_ids: Array,
    rows: Array,
    start: Array,
    lengths: Array,
    *,
    slots: int,
    parts: int,
    config: ModelConfig,
    tp: TensorParallel,
) -> tuple[Array, KVCache]:
    T, row = token_ids.shape[1], rows[0]
    reads = lengths[0] > start
    # A prompt that is the only one is never over; to select costs a copy of the cache.
    sequence = tuple(SequenceCache(layer, row, reads if parts > 1 else None) for layer in cache)
    last = lengths - 1 - start
    wanted = jnp.clip(last, 0, T - 1)
    x, sequence = hidden_states(params, token_ids, start[None], sequence, slots, config, tp, wanted)
    hidden = jnp.where((reads & (last < T))[:, None], x[0], hidden)
    return hidden, tuple(one.layer for one in sequence)


def _first_step(
    params: Params,
    hidden: Array,
    positions: Array,
    rows: SamplerRows,
    seen: Array | None,
    *,
    method: SamplingMethod,
    config: ModelConfig,
    tp: TensorParallel,
) -> Sampled:
    scores = logits(params, hidden, tp)
    return sample(scores, rows, positions, seen, config.vocab_size, method, tp)


def _decode_step(
    params: Params,
    cache: KVCache,
    tokens: Array,
    positions: Array,
    rows: SamplerRows,
    seen: Array | None,
    *,
    method: SamplingMethod,
    config: ModelConfig,
    tp: TensorParallel,
) -> tuple[Sampled, Array | None, KVCache]:
    (B, T), slots = tokens.shape, cache[0].values.shape[2]
    x, new_cache = hidden_states(params, tokens, positions, cache, slots, config, tp)
    seen = None if seen is None else mark_seen(seen, tokens[:, 0], tp)
    following = (positions[:, None] + 1 + jnp.arange(T)).reshape(-1)
    rows = jax.tree.map(lambda row: jnp.repeat(row, T, axis=0), rows)
    sampled = _first_step(
        params, x.reshape(B * T, -1), following, rows, seen, method=method, config=config, tp=tp
    )
    return jax.tree.map(lambda row: row.reshape(B, T), sampled), seen, new_cache
