# SPDX-License-Identifier: Apache-2.0
"""The architectures that can be run, each in a module of its own, imported when it is needed.

To add one, write `meshwen/models/<model_type>.py` with what `Architecture` lists, and add its line
to `MODEL_TYPES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from meshwen.models.config import ModelConfig, unsupported
from meshwen.models.config_json import config_file, folder_name, named_architecture, read_config

if TYPE_CHECKING:
    from jax import Array

    from meshwen.cache.kv_cache import KVCache
    from meshwen.ops.attention import RowTokens
    from meshwen.ops.operations import Ops
    from meshwen.ops.paged import PagedTokens
    from meshwen.weights.declaration import Params, WeightDeclaration

# `model_type` of a config.json, and the name of the module.
MODEL_TYPES = (
    "qwen2",
    "qwen3",
)


class Architecture(Protocol):
    """What a module of an architecture offers."""

    CONFIG: type[ModelConfig]

    def weights(self, config: Any) -> tuple[WeightDeclaration, ...]:
        """Every weight, in the order of the forward pass."""

    def hidden_states(
        self,
        params: Params,
        token_ids: Array,
        tokens: RowTokens | PagedTokens,
        cache: KVCache | None,
        config: Any,
        ops: Ops,
        *,
        last: Array | None = None,
    ) -> tuple[Array, KVCache]:
        """The final hidden states, and the cache: see `meshwen.models.decoder.hidden_states`."""

    def logits(self, params: Params, x: Array, ops: Ops) -> Array:
        """Logits of hidden states: see `meshwen.models.decoder.logits`."""


def architecture(model_type: str) -> Architecture:
    """The module of an architecture. Imports it, and JAX with it."""
    assert model_type in MODEL_TYPES
    return cast(Architecture, import_module(f"meshwen.models.{model_type}"))


def config_from_json(path: str | Path) -> ModelConfig:
    """Reads a ``config.json``, or that of a folder, by its architecture: `ModelConfig.from_json`.

    Raises MeshwenError, which names the file, when it is missing, not JSON or not supported.
    """
    file = config_file(path)
    return config_from_dict(read_config(file), name=folder_name(file), where=str(file))


def config_from_dict(
    data: Mapping[str, Any], *, name: str | None = None, where: str = "config.json"
) -> ModelConfig:
    """Builds the config of whichever architecture is named: `ModelConfig.from_dict`.

    Raises MeshwenError: none is named, or one that is not supported; or as `ModelConfig.from_dict`.
    """
    named = named_architecture(data, where)
    model_type = named[1]
    # Without a model_type, `architectures` decide.
    candidates = [model_type] if model_type in MODEL_TYPES else MODEL_TYPES
    for candidate in candidates:
        config = architecture(candidate).CONFIG
        if config.is_named(*named):
            return config.from_dict(data, name=name, where=where)
    raise unsupported(*named, [architecture(one).CONFIG for one in MODEL_TYPES], where)
