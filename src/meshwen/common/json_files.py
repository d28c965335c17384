# SPDX-License-Identifier: Apache-2.0
"""JSON in and out: untrusted files are read within limits and checked against a declared shape.

A shape is a `TypedDict` (of typing_extensions) with the constraints of annotated_types, so that
declaring one imports no schema library; pydantic checks values against it, strictly: no text is
taken for a number, no boolean for an integer. Keys that a shape does not name are let through.

What JSON leaves open is settled so:

- A byte order mark is passed over.
- A key that is given twice with different values is refused: readers disagree on which one counts.
- `NaN`, `Infinity` and `-Infinity` are read, as Python's and transformers' writers produce them,
  but no `Finite` takes them. They are never written: what is not finite becomes null.
- Halves of characters (lone surrogates) are refused: they cannot be printed or tokenised.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache, partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

from annotated_types import Ge, Lt, Predicate

from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails, SchemaValidator

SIZE_LIMIT_BYTES = 16 << 20
DEPTH_LIMIT = 100

TokenId = Annotated[int, Ge(0), Lt(2**31)]
Count = Annotated[int, Ge(0), Lt(2**63)]
Finite = Annotated[float, Predicate(isfinite)]

Shape = TypeVar("Shape")

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_EXPECTED = {
    "string_type": "text",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "none_required": "null",
    "predicate_failed": "a finite number",
}


def read_json(
    path: Path,
    shape: type[Shape],
    *,
    hint: str = "download it again",
    limit_bytes: int = SIZE_LIMIT_BYTES,
) -> Shape:
    """The value in a JSON file, which has the shape.

    Args:
        path: the file.
        shape: see `check_shape`.
        hint: what to do where the file is damaged; ends the messages.
        limit_bytes: a larger file is refused unread.

    Raises:
        MeshwenError: it cannot be read, is too large, is no JSON, or has another shape.
    """
    data = read_bytes(path, hint=hint, limit_bytes=limit_bytes)
    return check_shape(parse_json(data, str(path), hint=hint), shape, str(path), hint=hint)


def read_text(path: Path, *, hint: str = "download it again") -> str:
    """The text of a UTF-8 file. Raises MeshwenError as `read_json`."""
    try:
        return read_bytes(path, hint=hint).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _error(str(path), f"not UTF-8 text (at byte {error.start})", hint) from None


def read_bytes(path: Path, *, hint: str, limit_bytes: int = SIZE_LIMIT_BYTES) -> bytes:
    """The bytes of a file. Raises MeshwenError where it cannot be read, or is too large."""
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise MeshwenError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # A NUL in the path.
        raise MeshwenError(f"cannot read {shown(str(path))}: {error}") from None
    if len(data) > limit_bytes:
        raise _error(str(path), f"larger than {limit_bytes >> 20} MiB", hint)
    return data


def parse_json(text: bytes | str, where: str, *, hint: str = "") -> Any:
    """The value that JSON text stands for.

    Args:
        text: JSON; UTF-8 where it is bytes.
        where: what the text is, for messages.
        hint: as in `read_json`.

    Raises:
        MeshwenError: it is no JSON (see the module for what that means here), or lists and objects
            are nested deeper than `DEPTH_LIMIT`.
    """
    try:
        whole = text if isinstance(text, str) else text.decode()
        value = json.loads(whole.removeprefix("\ufeff"), object_pairs_hook=_object)
        if _SURROGATE_ESCAPE.search(whole):
            json.dumps(value, ensure_ascii=False).encode()
        too_deep = _deeper_than(value, DEPTH_LIMIT)
    except RecursionError:
        too_deep = True
    except UnicodeDecodeError as error:
        raise _error(where, f"not UTF-8 text (at byte {error.start})", hint) from None
    except UnicodeEncodeError:
        raise _error(where, "half of a character (a lone surrogate)", hint) from None
    except ValueError as error:
        raise _error(where, f"not valid JSON ({error})", hint) from None
    if too_deep:
        raise _error(where, f"nested deeper than {DEPTH_LIMIT} levels", hint)
    return value


def check_shape(value: Any, shape: type[Shape], where: str, *, hint: str = "") -> Shape:
    """The value itself, once it is known to have a shape.

    Args:
        value: what JSON can express.
        shape: a `TypedDict`, or `list[...]`, `dict[str, ...]` and so on.
        where: what holds the value, for messages.
        hint: as in `read_json`.

    Raises:
        MeshwenError: it has not; names the key, what is there and what should be.
    """
    from pydantic_core import ValidationError

    try:
        _validator(cast(Any, shape)).validate_python(value, strict=True)
    except ValidationError as error:
        problem = _first_problem(value, error.errors(include_url=False, include_context=False))
        raise _error(where, problem, hint) from None
    return cast(Shape, value)


def to_json(
    value: Any,
    *,
    indent: int | None = None,
    ensure_ascii: bool = True,
    sort_keys: bool = False,
) -> str:
    """Valid JSON for a value of dicts, lists, text and numbers; what is not finite becomes null."""
    write = partial(
        json.dumps,
        allow_nan=False,
        indent=indent,
        ensure_ascii=ensure_ascii,
        sort_keys=sort_keys,
    )
    try:
        return write(value)
    except ValueError:
        return write(_finite(value))


def shown(value: Any, limit: int = 60) -> str:
    """A value as a short piece of a message, as JSON where it is; unprintables are escaped."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (TypeError, ValueError, RecursionError):  # Keys that are no text, or circles.
        text = f"a {type(value).__name__}"
    text = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"key {shown(key)} is given twice, with different values")
    return found


def _deeper_than(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _error(where: str, problem: str, hint: str) -> MeshwenError:
    return MeshwenError(f"{where}: {problem}{f': {hint}' if hint else ''}")


@lru_cache(maxsize=64)
def _validator(shape: Any) -> SchemaValidator:
    """What checks a shape, up to the first error in a list or dict: there may be millions."""
    from pydantic import TypeAdapter
    from pydantic_core import SchemaError, SchemaValidator

    try:
        schema = TypeAdapter(shape).core_schema
        _fail_fast(schema)
        return SchemaValidator(schema)
    except SchemaError as error:  # pydantic makes one of Ctrl-C, too.
        if "Interrupt" not in str(error):
            raise
        raise KeyboardInterrupt from None


def _fail_fast(node: Any) -> None:
    if isinstance(node, dict):
        if node.get("type") in ("list", "dict"):
            node["fail_fast"] = True
        node = list(node.values())
    if isinstance(node, list | tuple):
        for inner in node:
            _fail_fast(inner)


def _first_problem(value: Any, errors: list[ErrorDetails]) -> str:
    """One of a value's problems in words: the deepest, since a union fails in each alternative."""
    paths = [_key_path(value, error) for error in errors]
    path = max(paths, key=len)  # The first of the deepest.
    here = [error for error, found in zip(errors, paths, strict=True) if found == path]
    key = _key(path)
    if here[0]["type"] == "missing":
        return f"{key} is missing"
    found = f"{key + ' is ' if key else 'found '}{shown(here[0]['input'])}"
    expected = (
        _EXPECTED.get(error["type"], error["msg"].removeprefix("Input should be "))
        for error in here
    )
    return f"{found}; expected {' or '.join(dict.fromkeys(expected))}"


def _key_path(value: Any, error: ErrorDetails) -> tuple[str | int, ...]:
    """Where an error is in the value: pydantic's location without the names of alternatives."""
    path: list[str | int] = []
    for step in error["loc"]:
        inside = isinstance(value, dict) and step in value
        if inside or (isinstance(value, list) and isinstance(step, int)):
            path.append(step)
            value = value[step]
    if error["type"] == "missing":
        path.append(error["loc"][-1])
    return tuple(path)


def _key(path: tuple[str | int, ...]) -> str:
    """A path as a user would write it: `rows[3].mesh`, `weight_map["a.b"]`."""
    text = ""
    for step in path:
        if isinstance(step, str) and re.fullmatch(r"\w{1,60}" if text else r"[\w.]{1,60}", step):
            text += f".{step}" if text else step
        else:
            text += f"[{shown(step)}]" if text else shown(step)
    return text
