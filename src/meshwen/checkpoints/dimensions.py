# SPDX-License-Identifier: Apache-2.0
"""Holds the dimensions that a config declares against what the files can contain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from meshwen.checkpoints.base import TensorSource
from meshwen.common.units import count_text
from meshwen.errors import MeshwenError
from meshwen.models.config import ModelConfig

# The smallest block format that is read has 2.6 bits a weight.
_MOST_WEIGHTS_PER_BYTE = 4
# So few cost nothing: `check_tensors` names what is wrong, tensor by tensor.
_FEW_WEIGHTS = 1 << 26


def check_dimensions(
    config: ModelConfig, tensors: Mapping[str, TensorSource], nbytes: int, where: Path
) -> None:
    """Refuses dimensions that the files cannot hold, before anything is sized by them.

    That the tensors fit the config exactly is for `meshwen.weights.loading.check_tensors` to say,
    which looks at each.

    Args:
        config: what the model is to be.
        tensors: of all files.
        nbytes: of all files.
        where: what declares the dimensions, for messages.

    Raises:
        MeshwenError: there are fewer tensors than layers, or fewer bytes than weights.
    """
    if config.num_hidden_layers > len(tensors):
        raise MeshwenError(
            f"{where}: num_hidden_layers is {config.num_hidden_layers}, but the checkpoint holds "
            f"{len(tensors)} tensors; it does not fit its config, or is incomplete"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    layer = 2 * (heads + kv_heads) * config.head_dim + 3 * config.intermediate_size
    weights = config.hidden_size * (config.num_hidden_layers * layer + config.vocab_size)
    if weights > max(_FEW_WEIGHTS, _MOST_WEIGHTS_PER_BYTE * nbytes):
        raise MeshwenError(
            f"{where}: a model of vocab_size {config.vocab_size}, hidden_size "
            f"{config.hidden_size}, intermediate_size {config.intermediate_size}, "
            f"{config.num_hidden_layers} layers and {heads} heads of {config.head_dim} has "
            f"{count_text(weights)} weights, more than the checkpoint's {nbytes} bytes can hold"
        )
