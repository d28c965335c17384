# SPDX-License-Identifier: Apache-2.0
"""The one declaration of every weight of Qwen2.

Shapes, shardings, loading, dummy weights, `inspect` and the checks for missing and unexpected
tensors all derive from the two tables below. The pytree of weights mirrors the names:
`model.layers.3.mlp.up_proj.weight` is `params["model"]["layers"][3]["mlp"]["up_proj"]["weight"]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from jax.sharding import NamedSharding

from meshwen.models.config import ModelConfig
from meshwen.ops.cpu.packing import packed_bytes
from meshwen.parallel.plan import ParallelPlan


@dataclass(frozen=True)
class Weight:
    """One tensor: its Hugging Face name and its logical axes in the checkpoint's order.

    Projections are `[out, in]` in a checkpoint and are kept `[in, out]` on the devices
    (`transposed`): XLA's CPU back end multiplies 8 float32 rows 1.4 times faster that way. Kernels
    read them from panels (`meshwen.ops.cpu.packing`).

    Attributes:
        name: in the checkpoint.
        axes: logical axes, in the checkpoint's order.
        transposed: whether they are swapped on the devices.
        leaf: the array holds only this one of the equal parts that each device's part of the
            last axis is cut into: exact numerics multiplies them one by one. None: all.
        path: where the array stands in the pytree, when not where `name` says.
    """

    name: str
    axes: tuple[str, ...]
    transposed: bool = False
    leaf: int | None = None
    path: str = ""

    def positions(self, plan: ParallelPlan) -> list[np.ndarray]:
        """For each axis on the devices, which position of the checkpoint's stands where.

        See `ParallelPlan.axis_source`.
        """
        sources = [plan.axis_source(axis) for axis in self.axes]
        if self.leaf is not None:
            leaves = prod(plan.leaves(self.axes[-1]))
            parts = sources[-1].reshape(plan.model_devices, leaves, -1)
            sources[-1] = parts[:, self.leaf].reshape(-1)
        return sources[::-1] if self.transposed else sources

    def packed(self, plan: ParallelPlan) -> bool:
        """Whether it is a `PackedWeight` on the devices: what is multiplied with may be."""
        return self.transposed and (plan.kernels or plan.quantization is not None)

    def shape(self, plan: ParallelPlan) -> tuple[int, ...]:
        """Shape in the checkpoint."""
        return tuple(plan.axis_size(axis) for axis in self.axes)

    def nbytes(self, shape: tuple[int, ...], plan: ParallelPlan, dtype: np.dtype[Any]) -> int:
        """Bytes on a device of a part of this shape, its axes in the checkpoint's order."""
        if self.packed(plan):
            return packed_bytes(shape, dtype, plan.quantization)
        return prod(shape) * dtype.itemsize

    @property
    def device_axes(self) -> tuple[str, ...]:
        """Logical axes in the order kept on the devices."""
        return self.axes[::-1] if self.transposed else self.axes

    def device_shape(self, plan: ParallelPlan) -> tuple[int, ...]:
        """Shape on all devices together, padding and copies included."""
        sizes = [plan.axis_length(axis) for axis in self.axes]
        if self.leaf is not None:
            sizes[-1] //= prod(plan.leaves(self.axes[-1]))
        return tuple(sizes[::-1] if self.transposed else sizes)

    def sharding(self, plan: ParallelPlan) -> NamedSharding:
        """Sharding of the array of `device_shape`, or of all arrays of a packed weight."""
        return plan.sharding(*(self.axes if self.packed(plan) else self.device_axes))

    def shard_shape(self, plan: ParallelPlan) -> tuple[int, ...]:
        """Shape of one device's part; if that is packed, without its padding."""
        return plan.sharding(*self.device_axes).shard_shape(self.device_shape(plan))


def _projection(name: str, output: str, inputs: str) -> Weight:
    return Weight(f"{name}.weight", (output, inputs), transposed=True)


_LAYER = (
    Weight("input_layernorm.weight", ("embed",)),
    _projection("self_attn.q_proj", "query", "embed"),
    Weight("self_attn.q_proj.bias", ("query",)),
    _projection("self_attn.k_proj", "key_value", "embed"),
    Weight("self_attn.k_proj.bias", ("key_value",)),
    _projection("self_attn.v_proj", "key_value", "embed"),
    Weight("self_attn.v_proj.bias", ("key_value",)),
    _projection("self_attn.o_proj", "embed", "query"),
    Weight("post_attention_layernorm.weight", ("embed",)),
    _projection("mlp.gate_proj", "mlp", "embed"),
    _projection("mlp.up_proj", "mlp", "embed"),
    _projection("mlp.down_proj", "embed", "mlp"),
)
EMBEDDING = Weight("model.embed_tokens.weight", ("vocab", "embed"))
_FINAL_NORM = Weight("model.norm.weight", ("embed",))
LM_HEAD = _projection("lm_head", "vocab", "embed")


def declared_weights(config: ModelConfig) -> list[Weight]:
    """Every weight of a model, in the order of its forward pass.

    With tied embeddings there is no `lm_head`: the model reads the embedding table twice.
    """
    layers = [
        Weight(f"model.layers.{i}.{w.name}", w.axes, w.transposed)
        for i in range(config.num_hidden_layers)
        for w in _LAYER
    ]
    head = [] if config.tie_word_embeddings else [LM_HEAD]
    return [EMBEDDING, *layers, _FINAL_NORM, *head]


def placed_weights(plan: ParallelPlan) -> list[Weight]:
    """Every array of weights on the plan's devices, each with its `path` in the pytree.

    These are the declared weights; but

    - in exact numerics a row-parallel weight is one array a leaf. Slices of one array would do, did
      XLA's CPU back end not copy them: a step of bfloat16 products then takes 4 times as long;
    - a tied embedding table is packed where kernels multiply with it, and looked up so. But
      quantised it also stands in the place of `lm_head`, as a lookup is of numbers that are not;
      and in exact numerics without kernels, whose products are cut along the hidden size.
    """
    declared = [replace(w, path=w.name) for w in declared_weights(plan.config)]
    if plan.config.tie_word_embeddings:
        transposed = replace(declared[0], transposed=True)
        if plan.kernels and not plan.quantization:
            declared[0] = transposed
        elif plan.exact or plan.quantization:
            declared.append(replace(transposed, path=LM_HEAD.name))
    if not plan.exact:
        return declared
    return [part for weight in declared for part in _leaves(weight, plan)]


def _leaves(weight: Weight, plan: ParallelPlan) -> list[Weight]:
    if weight.axes[-1] not in ("query", "mlp") or len(weight.axes) < 2:
        return [weight]
    shape = plan.leaves(weight.axes[-1])
    return [
        replace(weight, leaf=i, path=".".join([weight.path, *map(str, index)]))
        for i, index in enumerate(np.ndindex(shape))
    ]


def num_parameters(plan: ParallelPlan) -> int:
    """Parameters of the model as published: no padding, no copies, tied embeddings once."""
    return sum(prod(w.shape(plan)) for w in declared_weights(plan.config))


def unflatten(leaves: Iterable[tuple[str, Any]] | Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict from dotted names, with lists where the names count from 0."""
    items = leaves.items() if isinstance(leaves, Mapping) else leaves
    tree: dict[str, Any] = {}
    for name, leaf in items:
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return _lists(tree)


def _lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    children = {key: _lists(child) for key, child in node.items()}
    if all(key.isdigit() for key in children):
        return [children[key] for key in sorted(children, key=int)]
    return children
