# SPDX-License-Identifier: Apache-2.0
"""The compiled steps: one program, run by every device of the mesh on its own part.

Shapes are static. A step compiles once for each number of tokens, of sequences and of tokens asked
for, width of the block tables and sampling method; numbers are shape buckets. Where chunks of
prompts have many sizes, what is sampled after them is a program by itself. Of all these programs
those used last are kept. The cache is donated, so each step updates it in place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from meshwen.cache.kv_cache import KVCache, cache_axes, copied_blocks
from meshwen.engine import steps
from meshwen.engine.logprobs import Logprobs, prompt_logprobs_step
from meshwen.engine.penalties import Penalized
from meshwen.engine.sampling import Sampled, SamplerRows, SamplingMethod
from meshwen.engine.step_inputs import StepInputs
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
        forward_program, sampling_program: what `forward` and `step` call with the weights, jitted;
            to be lowered and looked at.
    """

    def __init__(self, model: ParallelModel, params: Params):
        self.model, self.params = model, params
        self.cache_axes = cache_axes(model.backend.cache_layout)
        self._params_spec = model.weights.partition_specs()
        self._programs = ProgramTable(model.backend.programs)
        self.logits_program = self.compiled(
            steps.logits_step, ("batch length",), "batch length vocab"
        )
        self.forward_program = self.compiled(
            steps.forward_step,
            (self.cache_axes, "batch"),
            ("batch embed", self.cache_axes),
            donate=(1,),
        )
        self.sampling_program = self.compiled(
            steps.sampling_step,
            (self.cache_axes, "batch", _ROWS, "batch vocab"),
            ("batch", "batch vocab", self.cache_axes),
            static="method",
            donate=(1, 4),
        )
        self.sample_program = self.compiled(
            steps.sample_step,
            ("batch embed", "batch", _ROWS, "batch vocab"),
            ("batch", "batch vocab"),
            static="method",
            donate=(4,),
        )
        self._logprobs = self.compiled(
            prompt_logprobs_step, ("batch embed", "batch"), "batch", static="top"
        )
        self._copied_blocks = self.compiled(
            _copied_blocks_step,
            (self.cache_axes, "batch", "batch"),
            self.cache_axes,
            donate=(1,),
        )
        self._empty_blocks = ShapedProgram(
            self._programs, lambda: Jitted(model.empty_blocks, static_argnums=0)
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
    def ops(self) -> Ops:
        """What each device computes with."""
        return self.model.ops

    @property
    def dtype(self) -> jnp.dtype:
        """Of weights and cached values, and of the inputs of matmuls with weights."""
        return self.model.dtype

    def empty_blocks(self, count: int) -> KVCache:
        """A cache of so many KV blocks on each part of the batch, which nothing is written to."""
        return self._empty_blocks(count)

    def copied_blocks(self, cache: KVCache, source: ArrayLike, destination: ArrayLike) -> KVCache:
        """The cache, donated, with some blocks as copies of others.

        Args:
            cache: KV blocks.
            source, destination: int32 [P*n], n blocks of each part of the batch, in its own
                numbers.
        """
        return self._copied_blocks(self.params, cache, source, destination)

    def logits(self, token_ids: ArrayLike) -> Array:
        """Logits of whole sequences, without a cache.

        Args:
            token_ids: int32 [B, T]; padding stands behind a sequence, where no token sees it.

        Returns:
            float32 [B, T, V padded to the mesh], the vocabulary split over the devices.
        """
        return self.logits_program(self.params, token_ids)

    def forward(self, cache: KVCache, inputs: StepInputs) -> Any:
        """Takes tokens of sequences into the cache.

        Args:
            cache: KV blocks, donated.
            inputs: the tokens.

        Returns:
            The final hidden states of the tokens asked for, float32 [P*B, D], or of all N; and the
            cache.
        """
        return self.forward_program(self.params, cache, inputs)

    def step(
        self,
        cache: KVCache,
        inputs: StepInputs,
        rows: SamplerRows,
        penalized: Penalized | None,
        method: SamplingMethod,
    ) -> tuple[Sampled, Penalized | None, KVCache]:
        """Takes tokens of sequences into the cache, and samples what follows some of them.

        Args:
            cache: KV blocks, donated.
            inputs: the tokens.
            rows: sampling parameters of the sequences.
            penalized: donated: the tokens of the sequences so far; None when `method` has no
                penalty.
            method: what the batch needs of the sampler.

        Returns:
            What follows each token asked for, [P*B], `penalized` with these, and the cache.
        """
        return self.sampling_program(self.params, cache, inputs, rows, penalized, method=method)

    def sample(
        self,
        hidden: Array,
        inputs: StepInputs,
        rows: SamplerRows,
        penalized: Penalized | None,
        method: SamplingMethod,
    ) -> tuple[Sampled, Penalized | None]:
        """What `step` samples, from what `forward` gives.

        Args:
            hidden: float32 [P*N, D], the final hidden states of all tokens of a step; with
                `inputs.of_asked()` of those asked for alone.
            inputs, rows, penalized, method: as `step` takes them; there are no drafts.
        """
        assert inputs.sampler_rows is None
        return self.sample_program(self.params, hidden, inputs, rows, penalized, method=method)

    def logprobs(self, hidden: Array, targets: ArrayLike, top: int) -> Logprobs:
        """Log-probabilities of tokens that follow others.

        Args:
            hidden: float32 [P*N, D], final hidden states.
            targets: int32 [P*N], the token that follows each.
            top: how many of the likeliest in its place to give too.
        """
        return self._logprobs(self.params, hidden, targets, top=top)

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


def _copied_blocks_step(
    params: Params, cache: KVCache, source: Array, destination: Array, *, model: ParallelModel
) -> KVCache:
    return copied_blocks(cache, source, destination, model.backend)


def _specs(plan: ParallelPlan, axes: Any) -> Any:
    """The partition spec of logical axes, or of each of several arrays' in a pytree."""
    return jax.tree.map(lambda names: plan.spec(*names.split()), axes)
