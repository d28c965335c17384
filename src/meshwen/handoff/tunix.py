# SPDX-License-Identifier: Apache-2.0
"""Weights as Tunix (google/tunix) holds those of its Qwen2, and back from there.

    graph, state = nnx.split(tunix.models.qwen2.model.Qwen2(config, rngs=nnx.Rngs(0)))
    nnx.replace_by_pure_dict(state, to_tunix(model.params, model.runner.model))
    trained = train(nnx.merge(graph, state))
    params = from_tunix(nnx.to_pure_dict(nnx.state(trained)), model.runner.model)

The names are those of Tunix 0.1. Its projections are [in, out], and those of attention have heads
and head size as axes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from meshwen.errors import MeshwenError
from meshwen.models.parallel_model import ParallelModel
from meshwen.parallel.sizes import ModelSizes
from meshwen.weights.declaration import Params, WeightDeclaration, unflatten
from meshwen.weights.loading import load_params
from meshwen.weights.saving import held_tensors
from meshwen.weights.source import Index, TensorSource

_MODEL = {
    "model.embed_tokens.weight": "embedder.input_embedding",
    "model.norm.weight": "final_norm.w",
    "lm_head.weight": "lm_head.w",
}
_LAYER = {
    "input_layernorm.weight": "input_layernorm.w",
    "post_attention_layernorm.weight": "post_attention_layernorm.w",
    **{f"self_attn.{one}_proj.weight": f"attn.{one}_proj.w" for one in "qkvo"},
    **{f"self_attn.{one}_proj.bias": f"attn.{one}_bias" for one in "qkv"},
    **{f"mlp.{one}_proj.weight": f"mlp.{one}_proj.kernel" for one in ("gate", "up", "down")},
}


def to_tunix(params: Params, model: ParallelModel) -> dict[str, Any]:
    """The state of Tunix' Qwen2, as `flax.nnx.to_pure_dict` gives one: nested dicts of arrays.

    Args:
        params: the model's weights, on devices of this process.
        model: a Qwen2 or Qwen2.5 model; in int8 the state is float32: see `held_tensors`.

    Returns:
        numpy arrays on the host, the whole model; layers have numbers for keys.

    Raises:
        MeshwenError: it is a model of another architecture.
    """
    names, sizes = _names(model), model.plan.sizes
    held = held_tensors(params, model.weights)

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for declared in model.weights.declarations:
            array = held[declared.name].read()
            array = array.T if declared.linear else array
            shape = _tunix_shape(declared, sizes)
            yield names[declared.name], np.ascontiguousarray(array).reshape(shape)

    state = unflatten(arrays())
    return state | {"layers": dict(enumerate(state["layers"]))}


def from_tunix(state: Mapping[Any, Any], model: ParallelModel) -> Params:
    """Weights on the devices of a mesh, of the state of Tunix' Qwen2: the inverse of `to_tunix`.

    Args:
        state: as `flax.nnx.to_pure_dict` gives it; arrays on devices of this process.
        model: how the weights are laid out.

    Raises:
        MeshwenError: it is a model of another architecture; an array is missing, unexpected (such
            as those of LoRA), of another shape, or not finite; or memory is short.
    """
    names = _names(model)
    declared = {names[one.name]: one for one in model.weights.declarations}
    tensors: dict[str, TensorSource] = {}
    for name, array in _flat(state):
        values = np.asarray(array)
        if name not in declared:
            raise MeshwenError(
                f"Tunix' state has {name}, which a {model.config.model_type} has not"
            )
        shape = _tunix_shape(declared[name], model.plan.sizes)
        if values.shape != shape:
            raise MeshwenError(
                f"Tunix' state has {name} of shape {list(values.shape)}, and the config makes it "
                f"{list(shape)}"
            )
        tensors[declared[name].name] = _StateTensor(
            name=declared[name].name,
            shape=declared[name].shape(model.plan.sizes),
            dtype=values.dtype,
            nbytes=values.nbytes,
            array=values,
            linear=declared[name].linear,
        )
    return load_params(_State(tensors), model.weights)


@dataclass(frozen=True, kw_only=True, eq=False)
class _StateTensor(TensorSource):
    """An array of Tunix' in the place of a checkpoint's tensor."""

    array: np.ndarray
    linear: bool

    def read(self, index: Index = ()) -> np.ndarray:
        shape = self.shape[::-1] if self.linear else self.shape
        values = self.array.reshape(shape)
        return (values.T if self.linear else values)[index]


@dataclass(frozen=True)
class _State:
    """What `load_params` asks of a checkpoint."""

    tensors: Mapping[str, TensorSource]
    path: Path | None = Path("Tunix' state")
    misfit_hint: str | None = None


def _names(model: ParallelModel) -> dict[str, str]:
    """Tunix' dotted names by Hugging Face's."""
    if model.config.model_type != "qwen2":
        raise MeshwenError(
            f"the model is a {model.config.model_type}: Tunix' names are known for qwen2 alone"
        )
    layers = range(model.config.num_hidden_layers)
    return _MODEL | {
        f"model.layers.{layer}.{ours}": f"layers.{layer}.{theirs}"
        for layer in layers
        for ours, theirs in _LAYER.items()
    }


def _tunix_shape(declared: WeightDeclaration, sizes: ModelSizes) -> tuple[int, ...]:
    """Of a matrix [in, out], where heads are an axis of their own: [D, N, H], [N, H, D]."""
    if not declared.linear:
        return declared.shape(sizes)
    heads = {"query": sizes.query_heads, "key_value": sizes.key_value_heads}
    split = [
        (heads[axis], sizes.head_dim) if axis in heads else (sizes[axis],)
        for axis in reversed(declared.axes)
    ]
    return tuple(size for sizes_of_axis in split for size in sizes_of_axis)


def _flat(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, ArrayLike]]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
