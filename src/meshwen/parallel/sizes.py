# SPDX-License-Identifier: Apache-2.0
"""The sizes of a model that its layout on a mesh depends on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of the axes of a model's weights, heads apart.

    Attributes:
        vocab: vocabulary.
        embed: hidden size.
        mlp: the MLP's inner dimension.
        query_heads: query heads; a multiple of `key_value_heads`.
        key_value_heads: key/value heads.
        head_dim: of a head.
    """

    vocab: int
    embed: int
    mlp: int
    query_heads: int
    key_value_heads: int
    head_dim: int

    def __getitem__(self, axis: str) -> int:
        """Size of a weight's logical axis in the checkpoint."""
        return {
            "vocab": self.vocab,
            "embed": self.embed,
            "mlp": self.mlp,
            "query": self.query_heads * self.head_dim,
            "key_value": self.key_value_heads * self.head_dim,
            "head_dim": self.head_dim,
        }[axis]
