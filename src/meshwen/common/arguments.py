# SPDX-License-Identifier: Apache-2.0
"""What users of the Python API pass, as the package holds it: plain ints, floats and lists.

numpy's, JAX's and torch's numbers and arrays stand for what they hold. `True` is no number here,
and 5.0 no token id: either is more likely a mistake than meant.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from difflib import get_close_matches
from numbers import Real
from typing import Any, SupportsIndex

import numpy as np

from meshwen.errors import MeshwenError

_LONGEST = 80  # characters of a value in a message


def brief(value: Any) -> str:
    """A value for a message: on one line, and not too long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # A stranger's object.
        text = f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def meant(name: str, known: Iterable[str], most: int = 3) -> str:
    """What may have been meant by an unknown name, for the place behind it; "" for nothing."""
    near = get_close_matches(name, list(known), n=most)
    return f" (did you mean {one_of(near)}?)" if near else ""


def one_of(words: Sequence[str]) -> str:
    """The words as a sentence has them: "auto, gguf or dummy"."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def whole_number(name: str, value: Any) -> int:
    """An int, from whatever Python takes for one as an index, but not from a bool.

    Raises:
        MeshwenError: it is none.
    """
    if not _is_whole(value):
        raise MeshwenError(f"{name} must be a whole number, not {brief(value)}")
    return operator.index(value)


def number(name: str, value: Any) -> float | int:
    """An int or float, also from an array of one number.

    Raises:
        MeshwenError: it is none.
    """
    if not isinstance(value, Real) and np.ndim(value) == 0 and hasattr(value, "dtype"):
        value = np.asarray(value).item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise MeshwenError(f"{name} must be a number, not {brief(value)}")
    try:
        found = float(value)
    except OverflowError:
        raise MeshwenError(f"{name} {brief(value)} is out of range") from None
    return whole_number(name, value) if _is_whole(value) else found


def truth(name: str, value: Any) -> bool:
    """A bool.

    Raises:
        MeshwenError: it is none: "no" would be taken for true.
    """
    if not isinstance(value, bool | np.bool_):
        raise MeshwenError(f"{name} must be true or false, not {brief(value)}")
    return bool(value)


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids, from a sequence, an iterator or an array of one axis.

    Raises:
        MeshwenError: it is none of them, or holds anything but whole numbers.
    """
    items = _items(name, value)
    if wrong := [one for one in items if not _is_whole(one)]:
        raise MeshwenError(f"{name} must be whole numbers, but one is {brief(wrong[0])}")
    return tuple(map(operator.index, items))


Prompt = str | tuple[int, ...] | list[Mapping[str, Any]]


def one_prompt(value: Any) -> Prompt:
    """A prompt: text, token ids, or the messages of a conversation.

    Raises:
        MeshwenError: it is none of these.
    """
    if isinstance(value, str):
        return str(value)
    items = _items("a prompt", value)
    if items and all(isinstance(one, Mapping) for one in items):
        return items
    if wrong := [one for one in items if not _is_whole(one)]:
        raise MeshwenError(
            "a prompt must be text, token ids, or a conversation as [{'role': ..., 'content': "
            f"...}}], but holds {brief(wrong[0])}"
        )
    return tuple(map(operator.index, items))


def several_prompts(value: Any) -> list[Prompt]:
    """One prompt or several, as a list.

    Raises:
        MeshwenError: one of them is none.
    """
    if isinstance(value, str):
        return [str(value)]
    items = _items("prompts", value)
    alone = [_is_whole(one) or isinstance(one, Mapping) for one in items]
    if items and all(alone):
        return [one_prompt(items)]
    if any(alone):
        raise MeshwenError("prompts must be text, or all lists of token ids, or one such list")
    return [one_prompt(one) for one in items]


def _items(name: str, value: Any) -> list[Any]:
    """What a sequence, an iterator or an array holds, as far as its order means something."""
    if isinstance(value, str | bytes | bytearray | memoryview):
        hint = "" if isinstance(value, str) else ": decode() the bytes"
        raise MeshwenError(f"{name} must not be {brief(value)}{hint}")
    if isinstance(value, Mapping):
        raise MeshwenError(
            f"{name} must not be {brief(value)}: pass what it holds, a message as [message]"
        )
    if isinstance(value, AbstractSet) or not isinstance(value, Iterable):
        raise MeshwenError(f"{name} must be text or a list, not {brief(value)}")
    if not hasattr(value, "__array__"):
        return list(value)
    array = np.asarray(value)  # JAX's and torch's arrays give their numbers one by one, slowly.
    if array.ndim == 0 or (array.size and array.dtype.kind not in "iuUO"):
        raise MeshwenError(
            f"{name} must be whole numbers or text, not an array {array.dtype} {array.shape}"
        )
    return list(array) if array.ndim > 1 else list(array.tolist())


def _is_whole(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool)
    dtype = getattr(value, "dtype", None)
    if dtype is not None and "bool" in str(dtype):
        return False
    if not isinstance(value, SupportsIndex):
        return False
    try:
        operator.index(value)
    except TypeError:  # An array of several, or of floats.
        return False
    return True
