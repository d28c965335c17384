# SPDX-License-Identifier: Apache-2.0
"""`EngineOptions`: how a model is loaded and run, for `from_pretrained` and for every command.

Importing this imports no JAX: `meshwen --help` shows the same texts, and is to be quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from meshwen.common.choices import (
    DTYPES,
    LOAD_FORMATS,
    NUMERICS,
    QUANTIZATIONS,
    DType,
    LoadFormat,
    Numerics,
    Quantization,
    check_choice,
)
from meshwen.common.option_fields import documented, option, options_of
from meshwen.common.units import bytes_or_share
from meshwen.engine.drafter import MOST_DRAFTS
from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from jax.typing import DTypeLike

    from meshwen.cache.budget import KVCachePlan
    from meshwen.models.config import ModelConfig
    from meshwen.models.parallel_model import ParallelModel
    from meshwen.parallel.mesh import AnyMesh


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a model is loaded onto a mesh and run there.

    `mesh` may also be a number or a JAX mesh, with axes of either type; its devices are looked for
    when `make_mesh` is called. `dtype` may also be a type of JAX's, numpy's or torch's; the
    attribute is its name. `kv_cache_memory` may be text; the attribute is an int of bytes, or a
    share as a float.

    Raises MeshwenError at construction when any other value is impossible.
    """

    mesh: str | int | Mesh = option(
        "1",
        "Devices: 8, 1x8 or 2x4 splits the model over 8; data=2,model=4 splits the batch over 2 "
        "and the model over 4. A CPU simulates devices that it lacks.",
        type=object,
    )
    model_axes: str | Sequence[str] | None = option(
        None,
        "The axis, or axes, of a JAX mesh that split the model. None: those named model (or "
        "model0, model1, ...).",
        type=object,
    )
    data_axes: str | Sequence[str] | None = option(
        None, "The axis, or axes, of a JAX mesh that split the batch. None: data.", type=object
    )
    dtype: DType | DTypeLike = option(
        "bfloat16",
        "Dtype of weights, matmul inputs and KV cache.",
        choices=DTYPES,
    )
    numerics: Numerics = option(
        "fast",
        "fast; or exact: the same bits on every mesh and in every batch, but slower.",
        choices=NUMERICS,
    )
    quantization: Quantization | None = option(
        None,
        "int8 rounds weights to 8 bits. The CPU kernels round matmul inputs too, and are "
        "faster than with bfloat16; without them int8 takes about 6 times as long on a CPU.",
        choices=QUANTIZATIONS,
    )
    load_format: LoadFormat = option(
        "auto",
        "File format of the weights; auto takes what is there. dummy reads none: the weights are "
        "random.",
        choices=LOAD_FORMATS,
    )
    revision: str | None = option(None, "Branch, tag or commit of a hub id.")
    max_num_seqs: int = option(
        8,
        "Most answers that run at the same time; fewer where memory is short.",
        type=int,
        least=1,
    )
    max_model_len: int | None = option(
        None,
        "Most tokens of a prompt and its answer. Default: the model's context.",
        type=int,
        least=2,
    )
    kv_cache_memory: int | float | str | None = option(
        None,
        "Memory for the KV cache on each device: bytes, such as 4GB, or a share of what is free, "
        "such as 50%. What running prompts leave keeps the beginnings of earlier ones. Default: as "
        "much as all that run may need, but at most 80%.",
        type=object,
        parse=bytes_or_share,
    )
    prefix_caching: bool = option(
        True,
        "Compute what prompts begin with once, and find it in the KV cache again.",
        type=bool,
    )
    max_num_batched_tokens: int = option(
        512,
        "Most tokens that a step computes, at least max_num_seqs: decode tokens first, then chunks "
        "of prompts. Draft tokens come on top.",
        type=int,
        least=16,
    )
    prompt_lookup_num_tokens: int = option(
        0,
        "Speculative decoding: tokens to draft in a step, from earlier text that ends alike. It is "
        "faster where answers repeat their prompt, for example with 7. 0: off.",
        type=int,
        least=0,
        most=MOST_DRAFTS,
    )

    def __post_init__(self) -> None:
        """Checks the values, and makes plain ints, words and tuples of them."""
        options = options_of(EngineOptions)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "dtype":
                value = dtype_name(value)
            elif isinstance(value, list):
                value = tuple(value)
            if value is not None or f.default is not None:
                value = options[f.name].checked(f.name, value)
            object.__setattr__(self, f.name, value)
        if self.max_num_batched_tokens < self.max_num_seqs:
            # Else sequences that decode could leave prompts none of a step, for as long as they do.
            raise MeshwenError(
                f"max_num_batched_tokens must be at least max_num_seqs, {self.max_num_seqs}, not "
                f"{self.max_num_batched_tokens}"
            )

    def make_mesh(self) -> Mesh:
        """The JAX mesh.

        Raises:
            MeshwenError: it does not parse, or there are too few devices: see
                `meshwen.parallel.mesh.make_mesh`.
        """
        from meshwen.parallel.mesh import make_mesh  # Imports JAX.

        return make_mesh(self.mesh, model_axes=self.model_axes, data_axes=self.data_axes)

    def parallel_model(self, config: ModelConfig, mesh: AnyMesh | None = None) -> ParallelModel:
        """A model on its mesh, before any weight is read.

        Args:
            config: the model's.
            mesh: in the place of these options'; an abstract one starts no back end.

        Raises:
            MeshwenError: there is no such mesh, or the model cannot be split over it.
        """
        import jax.numpy as jnp

        from meshwen.models.parallel_model import ParallelModel

        mesh = self.make_mesh() if mesh is None else mesh
        dtype = jnp.dtype(self.dtype)
        return ParallelModel(config, mesh, dtype, self.numerics, self.quantization)

    def longest_sequence(self, config: ModelConfig) -> int:
        """The most tokens of a prompt and its answer, which the config alone decides.

        Raises:
            MeshwenError: `max_model_len` is more than the model's context.
        """
        context = config.context_length
        length = context if self.max_model_len is None else self.max_model_len
        if length > context:
            raise MeshwenError(
                f"max_model_len must be from 2 to the model's context of {context}, not {length}"
            )
        return length

    def cache_plan(self, model: ParallelModel) -> KVCachePlan:
        """How many KV blocks there are, in the memory that the devices have free now.

        Args:
            model: the model on its mesh, whose weights are on the devices.

        Raises:
            MeshwenError: `max_model_len` is more than the model's context, or hardly a sequence
                fits.
        """
        from meshwen.cache.budget import KVCachePlan

        memory = self.kv_cache_memory
        assert not isinstance(memory, str), "parsed at construction"
        return KVCachePlan.of_memory(
            model.plan,
            model.token_bytes,
            model.backend.block_size,
            self.max_num_seqs,
            self.longest_sequence(model.config),
            memory,
        )

    def compared(self) -> dict[str, Any]:
        """What must be alike in all processes of a run, by name; JSON.

        The mesh and the checkpoint's files are left out: they are compared as what they are.
        """
        left_out = ("mesh", "model_axes", "data_axes", "load_format", "revision")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}


documented(EngineOptions, "Attributes, with their defaults")(EngineOptions)


class EngineKeywords(TypedDict, total=False):
    """The fields of `EngineOptions` as keyword arguments, for type checkers and editors."""

    mesh: str | int | Mesh
    model_axes: str | Sequence[str] | None
    data_axes: str | Sequence[str] | None
    dtype: DType | DTypeLike
    numerics: Numerics
    quantization: Quantization | None
    load_format: LoadFormat
    revision: str | None
    max_num_seqs: int
    max_model_len: int | None
    kv_cache_memory: int | float | str | None
    prefix_caching: bool
    max_num_batched_tokens: int
    prompt_lookup_num_tokens: int


def dtype_name(dtype: DTypeLike | None) -> str:
    """The name of a dtype, which may be a type of JAX's, numpy's or torch's.

    Raises:
        MeshwenError: it is none that weights are kept in.
    """
    name: Any = dtype
    if not isinstance(dtype, str):
        own = getattr(dtype, "dtype", dtype)  # Of jnp.float32; numpy's types have a descriptor.
        try:
            name = np.dtype(own if isinstance(own, np.dtype) else dtype).name
        except TypeError:
            name = str(dtype).removeprefix("torch.")
    # What was given is what the error shows: `jnp.float16`, and not its name.
    check_choice("dtype", name if dtype is not None and name in DTYPES else dtype, DTYPES)
    return str(name)
