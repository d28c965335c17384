# SPDX-License-Identifier: Apache-2.0
"""The forward pass as a function that can be differentiated, for training and research.

    def loss(params):
        logits = forward(model, params, input_ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    gradients = jax.grad(loss)(params)

On a mesh, key/value heads are copied, and heads, the MLP's inner dimension and the vocabulary are
padded. The gradient is that of the model all the same: each copy has the sum of what the copies
contribute, padding has zero. An optimiser that treats elements alike and apart (SGD, Adam, AdamW,
Lion, ...) then keeps copies equal and padding zero. (A tied table that exact numerics store twice
is two arrays, whose updates may differ in the last bit.)

`jax.shard_map` is differentiated from outside, as a whole. Then `check_vma=False` is no danger: JAX
gives each of n devices that return the same array 1/n of its cotangent, transposes an all-reduce to
an all-reduce, and adds what devices contribute to an array that all of them were given.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AbstractMesh
from jax.typing import ArrayLike

from meshwen.engine.steps import logits_step
from meshwen.errors import MeshwenError
from meshwen.handoff.plain import Plain, check_params, plain_params, typed_params
from meshwen.models.parallel_model import ParallelModel
from meshwen.ops.weight import Weight
from meshwen.parallel.heads import PADDING
from meshwen.parallel.plan import ParallelPlan
from meshwen.runtime.jax_settings import own_settings_in_trace
from meshwen.weights.declaration import Params, at, unflatten
from meshwen.weights.layout import WeightLayout, WeightTable


def forward(model: ParallelModel, params: Plain, input_ids: ArrayLike) -> Array:
    """Logits of whole sequences; a pure function, to be differentiated with respect to `params`.

    Compile what calls it with `jax.jit(..., compiler_options=model.compiler_options)`: exact
    numerics depends on these options. All activations are kept for the backward pass, unless
    `jax.checkpoint` says otherwise.

    Args:
        model: of `meshwen.handoff.parallel_model`.
        params: its weights, as `plain_params` gives them.
        input_ids: int [B, T], each below `vocab_size` (arrays on the host are held to it); B a
            multiple of the devices that split the batch. Padding stands behind a sequence, where
            no token sees it.

    Returns:
        float32 [B, T, vocab_size], without the padding of the vocabulary.

    Raises:
        MeshwenError: the model has no derivative, these are not its weights, or the ids are no such
            batch.
    """
    _check_differentiable(model)
    check_params(params, model.weights)
    ids = _checked_ids(model, input_ids)

    def step(params: Params, ids: Array) -> Array:
        with own_settings_in_trace():
            return logits_step(params, ids, model=model)

    mapped = jax.shard_map(
        step,
        mesh=model.mesh,
        in_specs=(model.weights.partition_specs(), model.plan.spec("batch", "length")),
        out_specs=model.plan.spec("batch", "length", "vocab"),
        check_vma=False,
    )
    weights = typed_params(_with_folded_gradient(model, params), model.weights)
    logits: Array = mapped(weights, ids.astype(jnp.int32))
    return logits[..., : model.config.vocab_size]


def _checked_ids(model: ParallelModel, input_ids: ArrayLike) -> Array:
    """The ids as an array; whether those on devices are in the vocabulary nobody looks."""
    ids, parts, config = jnp.asarray(input_ids), model.plan.data_devices, model.config
    if (
        ids.ndim != 2
        or 0 in ids.shape
        or not jnp.issubdtype(ids.dtype, jnp.integer)
        or ids.shape[0] % parts
    ):
        raise MeshwenError(
            f"input_ids must be integers [batch, tokens], the batch a multiple of {parts}, "
            f"not {ids.dtype} {list(ids.shape)}"
        )
    if ids.shape[1] > config.context_length:
        raise MeshwenError(
            f"{ids.shape[1]} tokens are more than the model's context of {config.context_length}"
        )
    host = None if isinstance(input_ids, Array) else np.asarray(input_ids)
    if host is not None and not 0 <= host.min() <= host.max() < config.vocab_size:
        raise MeshwenError(f"input_ids must be from 0 to {config.vocab_size - 1}")
    return ids


def folded(model: ParallelModel, gradients: Plain) -> Plain:
    """Gradients with the sum of all copies' in each copy, and zero in padding.

    Those through `forward` are so already. This is for a forward pass of your own: for what
    `jax.grad` gives of a function that calls a `jax.shard_map`.

    Args:
        model: on a mesh.
        gradients: of its weights, as `plain_params` lays them out.
    """
    given = typed_params(gradients, model.weights)
    found = {layout.path: at(given, layout.path) for layout in model.weights.stored}
    for table, head in _stored_twice(model.weights):
        total = found[table].array + found[head].array.T
        found[table], found[head] = (
            found[path].with_leaf(0, lambda _, array=array: array)
            for path, array in ((table, total), (head, total.T))
        )
    for layout in model.weights.stored:
        found[layout.path] = _folded_weight(found[layout.path], layout)
    return plain_params(unflatten(found), model.weights)


def global_norm(model: ParallelModel, tree: Plain) -> Array:
    """The norm of folded gradients, or of weights, in which each number of the model counts once.

    `optax.global_norm` counts every copy. To clip gradients as on one device, scale them by this.

    Args:
        model: on a mesh.
        tree: as `plain_params` lays weights out.

    Returns:
        float32 [].
    """
    typed, total = typed_params(tree, model.weights), jnp.float32(0)
    second = [head for _, head in _stored_twice(model.weights)]
    for layout in model.weights.stored:
        copies = model.plan.heads.pieces if "key_value" in layout.axes else 1
        for leaf in () if layout.path in second else at(typed, layout.path).leaves:
            total += jnp.square(leaf.astype(jnp.float32)).sum() / copies
    return jnp.sqrt(total)


def _check_differentiable(model: ParallelModel) -> None:
    if model.quantization is not None:
        raise MeshwenError(
            f"{model.quantization} weights are rounded, so they have no gradient: choose a model "
            "without quantization"
        )
    if model.weights.format is not None:
        raise MeshwenError(
            "the kernels have no derivative: make the model with kernels=False, "
            "as meshwen.handoff.parallel_model does"
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_folded_gradient(model: ParallelModel, params: Plain) -> Plain:
    """The weights; the gradient with respect to them is folded."""
    return params


_with_folded_gradient.defvjp(
    lambda model, params: (params, None),
    lambda model, _, gradients: (folded(model, gradients),),
)


def _stored_twice(table: WeightTable) -> Iterator[tuple[str, str]]:
    """The paths of embedding tables that also stand, transposed, in the place of the head."""
    first: dict[str, WeightLayout] = {}
    for layout in table.stored:
        other = first.setdefault(layout.declaration.name, layout)
        if other is not layout:
            assert layout.inputs_first
            assert not other.inputs_first
            yield other.path, layout.path


def _folded_weight(weight: Weight, layout: WeightLayout) -> Weight:
    for leaf in range(len(weight.leaves)):
        weight = weight.with_leaf(leaf, partial(_folded_leaf, layout=layout, leaf=leaf))
    return weight


def _folded_leaf(gradient: Array, layout: WeightLayout, leaf: int) -> Array:
    """A leaf's gradient, [in, out] or as in a checkpoint: summed over copies, zero in padding."""
    for axis, positions in enumerate(layout.positions(leaf)):
        if layout.axes[axis] == "key_value":
            gradient = _copies_added(gradient, axis, layout.plan)
        if (positions == PADDING).any():
            shape = [-1 if i == axis else 1 for i in range(gradient.ndim)]
            gradient = jnp.where(jnp.asarray(positions != PADDING).reshape(shape), gradient, 0)
    if isinstance(layout.sharding.mesh, AbstractMesh):
        return gradient  # Weights may lie on another mesh, with further axes, or on one device.
    # Else XLA chooses, and the next step would be compiled anew for weights that lie otherwise.
    return lax.with_sharding_constraint(gradient, layout.sharding)


def _copies_added(gradient: Array, axis: int, plan: ParallelPlan) -> Array:
    """An axis of key/value heads: the copies of each, which are neighbours, all get their sum."""
    heads, dtype = plan.heads, gradient.dtype
    if heads.pieces == 1:
        return gradient
    copies = heads.key_value_heads * heads.pieces * plan.sizes.head_dim
    given, padding = jnp.split(gradient.astype(jnp.float32), [copies], axis)
    shape = heads.key_value_heads, heads.pieces, plan.sizes.head_dim
    by_head = given.reshape(*given.shape[:axis], *shape, *given.shape[axis + 1 :])
    total = jnp.broadcast_to(by_head.sum(axis + 1, keepdims=True), by_head.shape)
    return jnp.concatenate([total.reshape(given.shape), padding], axis).astype(dtype)
