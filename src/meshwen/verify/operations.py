# SPDX-License-Identifier: Apache-2.0
"""The operations whose results are compared: named after the weights that a model declares."""

from __future__ import annotations

from dataclasses import dataclass

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


def operations(weights: WeightTable) -> tuple[Operation, ...]:
    """All that is compared, in the order of the forward pass."""
    return EMBEDDING, *row_parallel(weights), FINAL_NORM, LOGITS
