# SPDX-License-Identifier: Apache-2.0
"""The architectures that can be run, each in a module of its own, imported when it is first needed.

To add one, write `meshwen/models/<model_type>.py` with what `Architecture` lists, and add a line to
`ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from typing_extensions import TypedDict

from meshwen.common.json_files import check_shape, shown
from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    from meshwen.models.config import ModelConfig

# `model_type` of a config.json, which names the module too, and its class in `architectures`.
ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
}


class Architecture(Protocol):
    """What a module of an architecture offers."""

    CONFIG: type[ModelConfig]


class _Head(TypedDict, total=False):
    """What names the architecture in a config.json."""

    architectures: list[str] | str | None
    model_type: str | None


def architecture(model_type: str) -> Architecture:
    """The module of an architecture. Imports it, and JAX with it."""
    assert model_type in ARCHITECTURES
    return cast(Architecture, import_module(f"meshwen.models.{model_type}"))


def find_model_type(data: Mapping[str, Any], where: str) -> str:
    """The supported `model_type` that a config.json names, by itself or by `architectures`.

    An architecture's base model (`Qwen2Model`) counts as it: the same without its head, which tied
    embeddings stand for.

    Args:
        data: the contents of a config.json.
        where: the file, for messages.

    Raises:
        MeshwenError: it names none, one that is not supported, or two that differ.
    """
    head = {key: data[key] for key in ("architectures", "model_type") if key in data}
    head = check_shape(head, cast(type[dict[str, Any]], _Head), where)
    names, named = head.get("architectures") or [], head.get("model_type")
    names = [names] if isinstance(names, str) else names
    if not names and named is None:
        raise MeshwenError(
            f"{where}: neither architectures nor model_type is given; supported: {_supported()}"
        )
    for model_type, class_name in ARCHITECTURES.items():
        own_names = {class_name, class_name.replace("ForCausalLM", "Model")}
        if named in (None, model_type) and (not names or own_names & set(names)):
            return model_type
    raise MeshwenError(
        f"{where}: architecture {shown(', '.join(names) or 'unnamed')} (model_type "
        f"{shown(named)}) is not supported; supported: {_supported()}"
    )


def _supported() -> str:
    pairs = ARCHITECTURES.items()
    return ", ".join(f'{class_name} (model_type "{name}")' for name, class_name in pairs)
