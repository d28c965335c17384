# SPDX-License-Identifier: Apache-2.0
"""The compiled steps: one program, run by every device of the mesh on its own part.

Shapes are static. A decode step compiles once for each shape of the cache, number of tokens a row
and sampling method; prefill once for each shape of the cache, length of a chunk and number of
positions attended to. Lengths are shape buckets. Of all these programs those used last are kept.
The cache is donated, so each step updates it in place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from meshwen.cache.kv_cache import KVCache, cache_axes, cache_spec, resized, without_row
from meshwen.engine import steps
from meshwen.engine.penalties import Penalized
from meshwen.engine.sampling import Sampled, SamplerRows, SamplingMethod
from meshwen.models.config import ModelConfig
from meshwen.models.parallel_model import ParallelModel
from meshwen.ops.operations import Ops
from meshwen.parallel.plan import ParallelPlan
from meshwen.runtime.jax_settings import Jitted
from meshwen.runtime.programs import ProgramTable, ShapedProgram
from meshwen.weights.declaration import Params


class ModelRunner:
    """A model's weights on a mesh, and its compiled steps.

    Attributes:
        model: which model, laid out how, computing with what.
        params: the weights, placed as `model` says.
        prefill_program, decode_program: what `prefill` and `decode` call with the weights, jitted;
            to be lowered and looked at.
    """

    def __init__(self, model: ParallelModel, params: Params):
        self.model, self.params = model, params
        plan, layout = model.plan, model.backend.cache_layout
        self.cache_axes = cache_axes(layout)
        self._params_spec = model.weights.partition_specs()
        self._programs = ProgramTable(model.backend.programs)
        self.logits_program = self.compiled(
            steps.logits_step, ("batch length",), "batch length vocab"
        )
        self.prefill_program = self.compiled(
            partial(steps.prefill_step, parts=plan.data_devices),
            (self.cache_axes, "batch embed", "batch length", "batch", "", "batch"),
            ("batch embed", self.cache_axes),
            static="length",
            donate=(1, 2),
        )
        self.first_program = self.compiled(
            steps.first_step,
            ("batch embed", "batch", _ROWS, "batch vocab"),
            "batch",
            static="method",
        )
        self.decode_program = self.compiled(
            steps.decode_step,
            (self.cache_axes, "batch", "batch", _ROWS, "batch vocab"),
            ("batch", "batch vocab", self.cache_axes),
            static="method",
            donate=(1, 5),
        )
        cache_sharding = NamedSharding(plan.mesh, cache_spec(plan, layout))
        self._empty_cache = ShapedProgram(
            self._programs, lambda: Jitted(model.empty_cache, static_argnums=(0, 1))
        )
        self._resized = ShapedProgram(
            self._programs,
            lambda: Jitted(
                partial(resized, plan, layout),
                static_argnames=("batch", "length"),
                out_shardings=cache_sharding,
            ),
        )
        self._without_row = ShapedProgram(
            self._programs,
            lambda: Jitted(without_row, donate_argnums=0, out_shardings=cache_sharding),
        )
        self._empty_hidden = ShapedProgram(
            self._programs,
            lambda: Jitted(
                lambda batch: jnp.zeros((batch, plan.sizes.embed), jnp.float32),
                static_argnums=0,
                out_shardings=plan.sharding("batch", "embed"),
            ),
        )

    @property
    def plan(self) -> ParallelPlan:
        """How the model lies on the mesh."""
        return self.model.plan

    @property
    def config(self) -> ModelConfig:
        """The model's hyperparameters."""
        return self.model.config

    @property
    def score_heads(self) -> int:
        """Query heads of a device whose scores attention writes to memory, padding included."""
        return self.plan.heads.local_query_heads if self.model.backend.stores_scores else 0

    @property
    def ops(self) -> Ops:
        """What each device computes with."""
        return self.model.ops

    @property
    def dtype(self) -> jnp.dtype:
        """Of weights and cached values, and of the inputs of matmuls with weights."""
        return self.model.dtype

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """A cache for `batch` sequences (a multiple of the plan's data devices)."""
        return self._empty_cache(batch, length)

    def resized(self, cache: KVCache, batch: int, length: int) -> KVCache:
        """The cache with more sequences (on each part of the batch) and positions, the new empty.

        It is not donated: both exist for a moment.
        """
        # A layer compiles sooner than all.
        return tuple(self._resized(layer, batch=batch, length=length) for layer in cache)

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
        return self.logits_program(self.params, token_ids)

    def prefill(
        self,
        cache: KVCache,
        hidden: Array,
        token_ids: ArrayLike,
        rows: ArrayLike,
        start: ArrayLike,
        lengths: ArrayLike,
        length: int,
    ) -> tuple[Array, KVCache]:
        """Prefills a chunk of a prompt into the cache, on each of the P parts of the batch.

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
            length: how many positions of the cache the tokens may attend to, at least start + T;
                how many are read is the back end's `positions_read`.

        Returns:
            The final hidden states of the prompts' last tokens so far, and the cache.
        """
        backend = self.model.backend
        length = backend.positions_read(length, cache[0].length(backend.cache_layout))
        return self.prefill_program(
            self.params, cache, hidden, token_ids, rows, start, lengths, length=length
        )

    def first(
        self,
        hidden: Array,
        positions: ArrayLike,
        rows: SamplerRows,
        penalized: Penalized | None,
        method: SamplingMethod,
    ) -> Sampled:
        """The token after each prompt, from what `prefill` returned; see `decode`."""
        return self.first_program(self.params, hidden, positions, rows, penalized, method=method)

    def decode(
        self,
        cache: KVCache,
        tokens: ArrayLike,
        positions: ArrayLike,
        rows: SamplerRows,
        penalized: Penalized | None,
        method: SamplingMethod,
    ) -> tuple[Sampled, Penalized | None, KVCache]:
        """One step of every sequence.

        Args:
            cache: donated.
            tokens: int32 [B, T], each sequence's newest token, and draft tokens after it.
            positions: int32 [B], of the newest tokens; all T are within the cache.
            rows: sampling parameters.
            penalized: donated: the tokens of the sequences so far, with T = 1; None when `method`
                has no penalty.
            method: what the batch needs of the sampler.

        Returns:
            The tokens that follow each of the T, [B, T], `penalized` with these, and the cache.
        """
        return self.decode_program(
            self.params, cache, tokens, positions, rows, penalized, method=method
        )

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
            step: a function of the weights, arrays, and keywords `model` and `static`.
            in_axes: logical axes of the arrays, "batch vocab", or of all arrays of a pytree.
            out_axes: those of the results.
            static: the keyword whose every value is compiled for itself.
            donate: positions of arguments whose memory the results may take.
        """

        # Not `self`: in a cycle with its programs, the weights would outlive their last use.
        model, plan = self.model, self.plan
        in_specs = (self._params_spec, *_specs(plan, in_axes))
        out_specs = _specs(plan, out_axes)

        def make() -> Jitted:
            def program(params: Params, *arguments: Any, **options: Any) -> Any:
                mapped = jax.shard_map(
                    partial(step, model=model, **options),
                    mesh=plan.mesh,
                    in_specs=in_specs,
                    out_specs=out_specs,
                    check_vma=False,
                )
                return mapped(params, *arguments)

            program.__name__ = getattr(step, "func", step).__name__.strip("_")
            return Jitted(
                program,
                static_argnames=static,
                donate_argnums=donate,
                compiler_options=model.compiler_options,
            )

        return ShapedProgram(self._programs, make)


_ROWS: Any = SamplerRows.filled("batch", "batch vocab")


def _specs(plan: ParallelPlan, axes: Any) -> Any:
    """The partition spec of logical axes, or of each of several arrays' in a pytree."""
    return jax.tree.map(lambda names: plan.spec(*names.split()), axes)
