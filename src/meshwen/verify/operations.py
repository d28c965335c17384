# SPDX-License-Identifier: Apache-2.0
"""The operations whose results are compared: named after the weights that a model declares."""

from __future__ import annotations

from dataclasses import dataclass

from meshwen.weights.declaration import Part
from meshwen.weights.layout import WeightLayout, WeightTable


@dataclass(frozen=True)
class Operation:
    """An operation of a model; `layer` None outside of the layers."""

    layer: int | None
    name: str

    def __str__(self) -> str:
        return self.name if self.layer is None else f"layer {self.layer}, {self.name}"

    @property
    def key(self) -> str:
        """Its name in a certificate."""
        return self.name if self.layer is None else f"{self.layer}:{self.name}"


EMBEDDING, FINAL_NORM, LOGITS = (
    Operation(None, name) for name in ("embedding", "final norm", "logits")
)


def row_parallel(weights: WeightTable) -> dict[Operation, WeightLayout]:
    """The matmuls that are sums over devices, in the order of the forward pass, by weight."""
    found: dict[Operation, WeightLayout] = {}
    for weight in weights.stored:
        declared = weight.declaration
        if declared.sums_over_devices:
            operation = Operation(declared.layer, declared.sum_name)
            assert operation not in found, f"{declared.name}: two weights give {operation}"
            found[operation] = weight
    return found


def norms(weights: WeightTable) -> dict[Operation, WeightLayout]:
    """The norms of the residual stream, in the order of the forward pass, by weight."""
    found: dict[Operation, WeightLayout] = {}
    for weight in weights.declared:
        declared = weight.declaration
        if declared.part is Part.NORM and declared.axes == ("embed",):
            name = declared.name.split(".")[-2]
            inside = declared.layer is not None
            found[Operation(declared.layer, name) if inside else FINAL_NORM] = weight
    return found


def layer_outputs(weights: WeightTable) -> dict[Operation, Operation]:
    """The residual stream after each layer, by the row-parallel matmul that ends the layer."""
    last = {operation.layer: operation for operation in row_parallel(weights)}
    return {operation: Operation(layer, "layer output") for layer, operation in last.items()}


def operations(weights: WeightTable) -> tuple[Operation, ...]:
    """All that meshes are compared by, in the order of the forward pass."""
    return EMBEDDING, *row_parallel(weights), FINAL_NORM, LOGITS


def modules(weights: WeightTable) -> dict[str, Operation]:
    """All that can be recorded, in the order of the forward pass, by Hugging Face's module.

    The module is the one whose output it is: `model.layers.0.self_attn` gives the attention output.
    """
    matmuls = {weight.path: operation for operation, weight in row_parallel(weights).items()}
    normed = {weight.path: operation for operation, weight in norms(weights).items()}
    outputs = layer_outputs(weights)
    found = {}
    for declared in weights.declarations:
        *module, _, _ = declared.name.split(".")
        if declared.part is Part.EMBEDDING:
            found[declared.name.removesuffix(".weight")] = EMBEDDING
        if declared.name in normed:
            found[declared.name.removesuffix(".weight")] = normed[declared.name]
        if (operation := matmuls.get(declared.name)) is not None:
            found[".".join(module)] = operation
            if operation in outputs:
                found[".".join(module[:-1])] = outputs[operation]
    return {**found, "lm_head": LOGITS}
