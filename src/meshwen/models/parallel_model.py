# SPDX-License-Identifier: Apache-2.0
"""A model on a mesh: which model, laid out how, computing with what. Its weights come apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh

from meshwen.cache.kv_cache import (
    KVCache,
    cache_bytes_per_token,
    cache_shapes,
    empty_blocks,
)
from meshwen.common.choices import NUMERICS, QUANTIZATIONS, Quantization, check_choice
from meshwen.common.choices import Numerics as NumericsName
from meshwen.models.config import ModelConfig
from meshwen.models.registry import Architecture, architecture
from meshwen.ops.attention import RowTokens
from meshwen.ops.backend import Backend, CompilerOptions
from meshwen.ops.backends import backend_of
from meshwen.ops.cache_layout import CacheLayout
from meshwen.ops.numerics.base import Numerics
from meshwen.ops.numerics.exact import Exact
from meshwen.ops.numerics.fast import Fast
from meshwen.ops.operations import Ops
from meshwen.ops.paged import PagedTokens
from meshwen.parallel.collectives import Collectives
from meshwen.parallel.plan import ParallelPlan
from meshwen.weights.declaration import Params
from meshwen.weights.layout import WeightTable

# Into how many leaves exact numerics cuts what is split over devices, heads apart: a mesh may split
# a model over any number of devices that divides it.
_EXACT_LEAVES = 32


@dataclass(frozen=True)
class ParallelModel:
    """A model on a mesh.

    Attributes:
        config: the model's hyperparameters.
        mesh: abstract is enough to tell the layout, with no devices behind it.
        dtype: of weights, cached values, and the inputs of matmuls with weights.
        numerics: "fast", or "exact": see `meshwen.ops.numerics`.
        quantization: "int8", or None: see `meshwen.ops.quant`.
        kernels: whether the back end's kernels compute where it has any. Without, XLA computes
            everything: such programs can be differentiated, and exported.
        data_names: the mesh's axes that split the batch: see `meshwen.parallel.plan.ParallelPlan`.

    Raises:
        MeshwenError: there are no such numerics, or none for this model on this mesh or for this
            dtype; or there is no such quantization.
    """

    config: ModelConfig
    mesh: Mesh | AbstractMesh
    dtype: jnp.dtype
    numerics: NumericsName = "fast"
    quantization: Quantization | None = None
    kernels: bool = True
    data_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.quantization is not None:
            check_choice("quantization", self.quantization, QUANTIZATIONS)
        check_choice("numerics", self.numerics, NUMERICS)
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        _ = self.plan  # Refuses what has no layout.
        if self.numerics == "exact":
            self.backend.check_ordered(self.dtype)

    @cached_property
    def architecture(self) -> Architecture:
        """Its weights' declaration and its forward pass."""
        return architecture(self.config.model_type)

    @cached_property
    def plan(self) -> ParallelPlan:
        """How it lies on the mesh."""
        leaves = _EXACT_LEAVES if self.numerics == "exact" else None
        return ParallelPlan(self.config.sizes, self.mesh, leaves, self.data_names)

    @cached_property
    def backend(self) -> Backend:
        """What multiplies and attends."""
        return backend_of(self.mesh, with_kernels=self.kernels)

    @cached_property
    def ops(self) -> Ops:
        """What each device computes with."""
        policy: Numerics = Fast()
        if self.numerics == "exact":
            policy = Exact(vocabulary_leaves=self.plan.local_leaves)
        return Ops(Collectives(self.plan.model_axes), policy, self.backend)

    @property
    def compiler_options(self) -> CompilerOptions | None:
        """Options of XLA's compiler for programs of it: an argument of `jax.jit`."""
        return self.backend.compiler_options(self.ops.numerics.ordered)

    @cached_property
    def weights(self) -> WeightTable:
        """How its weights are stored."""
        declarations = self.architecture.weights(self.config)
        format = self.backend.format(self.quantization)
        return WeightTable(self.plan, declarations, self.dtype, format)

    def hidden_states(
        self,
        params: Params,
        token_ids: Array,
        tokens: RowTokens | PagedTokens,
        cache: KVCache | None,
        *,
        last: Array | None = None,
        ops: Ops | None = None,
    ) -> tuple[Array, KVCache]:
        """The final hidden states, and the cache: see `meshwen.models.decoder.hidden_states`.

        For each device, under `shard_map`; `ops` take the place of the model's own.
        """
        return self.architecture.hidden_states(
            params, token_ids, tokens, cache, self.config, ops or self.ops, last=last
        )

    def logits(self, params: Params, x: Array) -> Array:
        """Logits of hidden states: float32 [..., D] -> float32 [..., V/n]."""
        return self.architecture.logits(params, x, self.ops)

    def cache_shapes(self, batch: int, length: int, layout: CacheLayout | None = None) -> KVCache:
        """Shapes, dtypes and shardings of a cache: see `meshwen.cache.kv_cache`.

        Args:
            batch: sequences.
            length: positions.
            layout: in the place of the back end's.
        """
        layers, layout = self.config.num_hidden_layers, layout or self.backend.cache_layout
        return cache_shapes(self.plan, layout, layers, batch, length, self.dtype)

    def empty_blocks(self, count: int) -> KVCache:
        """A cache of so many KV blocks on each part of the batch, which nothing is written to."""
        backend, layers = self.backend, self.config.num_hidden_layers
        shapes = cache_shapes(
            self.plan,
            backend.cache_layout,
            layers,
            count * self.plan.data_devices,
            backend.block_size,
            self.dtype,
            head_dim=backend.block_head_dim(self.config.head_dim),
        )
        return empty_blocks(shapes, backend)

    @property
    def token_bytes(self) -> int:
        """Bytes of cache that one token takes on each device."""
        return self.cache_bytes_per_token(self.plan.heads.local_key_value_heads)

    def cache_bytes_per_token(self, heads: int) -> int:
        """Bytes of cache that one token takes for `heads` key/value heads."""
        layers, head_dim = self.config.num_hidden_layers, self.config.head_dim
        held = self.backend.block_head_dim(head_dim)
        return cache_bytes_per_token(layers, heads, held, self.dtype)

    @property
    def matmuls_by(self) -> str:
        """What multiplies rows with weights: see `Backend.matmul_name`."""
        ordered = self.numerics == "exact"
        return self.backend.matmul_name(self.dtype, self.quantization, ordered=ordered)
