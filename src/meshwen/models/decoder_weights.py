# SPDX-License-Identifier: Apache-2.0
"""Declarations of the weights that decoders share, for an architecture's file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from meshwen.models.config import ModelConfig
from meshwen.weights.declaration import Part, WeightDeclaration


def norm(name: str, axis: str = "embed", every_token: bool = False) -> WeightDeclaration:
    """The weight of a norm."""
    return WeightDeclaration(
        f"{name}.weight", (axis,), Part.NORM, every_token=every_token, dummy_mean=1.0
    )


def projection(name: str, output: str, inputs: str, part: Part) -> WeightDeclaration:
    """The weight of a linear layer, [output, inputs]."""
    return WeightDeclaration(
        f"{name}.weight", (output, inputs), part, linear=True, every_token=part is Part.KEY_VALUE
    )


def bias(name: str, output: str, part: Part) -> WeightDeclaration:
    """The bias of a linear layer."""
    return WeightDeclaration(f"{name}.bias", (output,), part, every_token=part is Part.KEY_VALUE)


# SwiGLU.
GATED_MLP = (
    projection("mlp.gate_proj", "mlp", "embed", Part.MLP),
    projection("mlp.up_proj", "mlp", "embed", Part.MLP),
    projection("mlp.down_proj", "embed", "mlp", Part.MLP),
)


def decoder_weights(
    config: ModelConfig, layer: Sequence[WeightDeclaration]
) -> tuple[WeightDeclaration, ...]:
    """Every weight of a decoder, in the order of its forward pass.

    With tied embeddings there is no `lm_head`: the embedding table is multiplied with too.

    Args:
        config: the model's.
        layer: the weights of each layer, named from the layer on.
    """
    layers = [
        replace(one, name=f"model.layers.{i}.{one.name}", layer=i)
        for i in range(config.num_hidden_layers)
        for one in layer
    ]
    head = projection("lm_head", "vocab", "embed", Part.HEAD)
    tied = config.tie_word_embeddings
    table = WeightDeclaration(
        "model.embed_tokens.weight",
        ("vocab", "embed"),
        Part.EMBEDDING,
        tied=head.name if tied else None,
    )
    return table, *layers, norm("model.norm"), *(() if tied else (head,))
