# SPDX-License-Identifier: Apache-2.0
"""How a served model lies on its mesh, in words and lists, for those who look at the server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from meshwen.parallel.heads import HeadLayout, as_lists

if TYPE_CHECKING:
    from meshwen.causal_lm import CausalLM


@dataclass(frozen=True)
class Layout:
    """A model on a mesh.

    Attributes:
        label: of the mesh: "2x4".
        copies: of the model, which share the batch.
        heads: which heads each device of a copy holds.
        weights: what they are kept as: "bfloat16", "int8".
        numerics: "fast" or "exact".
    """

    label: str
    copies: int
    heads: HeadLayout
    weights: str
    numerics: str

    @classmethod
    def of(cls, model: CausalLM, numerics: str) -> Self:
        """The layout of a loaded model."""
        from meshwen.parallel.mesh import mesh_label

        parallel = model.runner.model
        return cls(
            mesh_label(model.mesh),
            parallel.plan.data_devices,
            parallel.plan.heads,
            str(parallel.quantization or model.dtype),
            numerics,
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON has it: heads by device, null for padding."""
        return {
            "label": self.label,
            "copies": self.copies,
            "weights": self.weights,
            "numerics": self.numerics,
            "model_query_heads": self.heads.query_heads,
            "model_key_value_heads": self.heads.key_value_heads,
            "query_heads": as_lists(self.heads.device_query_heads()),
            "key_value_heads": as_lists(self.heads.device_key_value_heads()),
        }
