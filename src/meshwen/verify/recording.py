# SPDX-License-Identifier: Apache-2.0
"""A forward pass that records what its operations give, and can go on with others' values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array

from meshwen.models.parallel_model import ParallelModel
from meshwen.ops.attention import RowTokens
from meshwen.ops.operations import Linear, Ops
from meshwen.ops.weight import Weight
from meshwen.verify.operations import (
    EMBEDDING,
    LOGITS,
    Operation,
    layer_outputs,
    norms,
    row_parallel,
)
from meshwen.weights.declaration import Params, at

# Changes the input and the weight of a row-parallel matmul.
RowHook = Callable[[Operation, Array, Weight], tuple[Array, Weight]]


def recorded(
    params: Params,
    token_ids: Array,
    model: ParallelModel,
    *,
    row_hook: RowHook | None = None,
    given: Mapping[Operation, Array] | None = None,
    go_on_with_given: Array | bool = False,
) -> dict[Operation, Array]:
    """What the operations give for whole sequences, on each device under `shard_map`.

    Args:
        params: this device's weights.
        token_ids: int32 [B, T]; padding stands behind a sequence.
        model: the model.
        row_hook: changes row-parallel matmuls.
        given: float32 [B, T, D], what operations but the logits gave elsewhere.
        go_on_with_given: bool [], whether the rest is computed from `given` where it has a value. A
            layer's output takes the place of the residual stream.

    Returns:
        Of the embedding, the norms of the residual stream, the row-parallel matmuls and the layers
        what this model gives for its inputs: float32 [B, T, D]; and the logits, [B, T, V/n].
    """
    own, weights = model.ops, model.weights
    named = {**row_parallel(weights), **norms(weights)}
    ops = _RecordingOps(
        own.collectives,
        own.numerics,
        own.backend,
        names={id(at(params, layout.path)): operation for operation, layout in named.items()},
        layer_outputs=layer_outputs(weights),
        row_hook=row_hook,
        given=given or {},
        go_on_with_given=go_on_with_given,
    )
    # Without jit all layers are traced one by one, so that each records its own results.
    with jax.disable_jit():
        start, T = jnp.zeros(len(token_ids), jnp.int32), token_ids.shape[1]
        x, _ = model.hidden_states(params, token_ids, RowTokens(start, T, T), None, ops=ops)
    found = {**ops.recorded, LOGITS: model.logits(params, x)}
    missing = {EMBEDDING, *named, *ops.layer_outputs.values()} - set(found)
    assert not missing, f"not recorded: {', '.join(map(str, missing))}"
    return found


@dataclass(frozen=True)
class _RecordingOps(Ops):
    """Operations that record their results, by the weights that they are called with.

    Attributes:
        names: of row-parallel matmuls and norms, by the identity of their weight.
        layer_outputs: by the matmul that ends the layer.
        row_hook, given, go_on_with_given: see `recorded`.
        recorded: the results so far.
        stream: the residual stream as the latest norm read it.
    """

    names: Mapping[int, Operation] = field(default_factory=dict)
    layer_outputs: Mapping[Operation, Operation] = field(default_factory=dict)
    row_hook: RowHook | None = None
    given: Mapping[Operation, Array] = field(default_factory=dict)
    go_on_with_given: Array | bool = False
    recorded: dict[Operation, Array] = field(default_factory=dict, compare=False)
    stream: list[Array] = field(default_factory=list, compare=False)

    def embed(self, token_ids: Array, layer: Linear) -> Array:
        return self._record(EMBEDDING, super().embed(token_ids, layer))

    def rms_norm(self, x: Array, layer: Linear, eps: float) -> Array:
        y = super().rms_norm(x, layer, eps)
        operation = self.names.get(id(layer["weight"]))
        if operation is None:  # Of heads.
            return y
        self.stream[:] = [x]
        return self._record(operation, y)

    def row(self, x: Array, layer: Linear) -> Array:
        operation = self.names[id(layer["weight"])]
        if self.row_hook is not None:
            x, weight = self.row_hook(operation, x, layer["weight"])
            layer = {**layer, "weight": weight}
        y = self._record(operation, super().row(x, layer))
        if (output := self.layer_outputs.get(operation)) is None:
            return y
        (before,) = self.stream
        self.recorded[output] = before + y
        if output not in self.given:
            return y
        return jnp.where(self.go_on_with_given, self.given[output] - before, y)

    def _record(self, operation: Operation, value: Array) -> Array:
        """Records a value; what the model goes on with."""
        self.recorded[operation] = value
        if operation not in self.given:
            return value
        return jnp.where(self.go_on_with_given, self.given[operation], value)
