# SPDX-License-Identifier: Apache-2.0
"""What a model's name stands for, and what may have been meant by one that stands for nothing."""

from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Literal

from meshwen.checkpoints.hub import looks_like_hub_id
from meshwen.common.arguments import one_of
from meshwen.common.paths import exists, user_path
from meshwen.errors import MeshwenError
from meshwen.models.presets import PRESETS

_EXPECTED = (
    "pass a model folder, a .gguf file, a hub id such as Qwen/Qwen2.5-0.5B-Instruct, or demo"
)
_MOST_FILES = 1000  # of a folder, among which a close name is looked for


def name_kind(name: str) -> Literal["path", "preset", "hub"]:
    """What a model's name stands for: a path goes before a preset, and a preset before a hub id.

    "demo" always stands for the path of the demo model.

    Raises:
        MeshwenError: it is none of all; names what there is with a name like it.
    """
    if not name.strip():
        raise MeshwenError(f"the model's name is empty: {_EXPECTED}")
    if name == "demo" or exists(user_path(name)):
        return "path"
    if name.lower() in PRESETS:
        return "preset"
    if looks_like_hub_id(name):
        return "hub"
    raise MeshwenError(f"{name} does not exist{_near(name)}; {_EXPECTED}")


def _near(name: str) -> str:
    """What may have been meant, for the end of "NAME does not exist"; "" for nothing."""
    path = user_path(name)
    if files := get_close_matches(path.name, _beside(path), n=1):
        return f" (did you mean {path.parent / files[0]}?)"
    sizes = get_close_matches(name.lower(), PRESETS) if path.name == name else []
    if not sizes:
        return ""
    return (
        f" (did you mean a published size, {one_of(sizes)}? "
        "It has no weights: for inspect, or with --load-format dummy)"
    )


def _beside(path: Path) -> list[str]:
    """The names in a path's folder: the first of many, none where it cannot be read."""
    try:
        return [one.name for one in islice(path.parent.iterdir(), _MOST_FILES)]
    except OSError:
        return []
