# SPDX-License-Identifier: Apache-2.0
"""Request bodies that nobody should send, made from the schemas of those that people do.

`Bodies(openapi).body(path, draw)` is a body that the schema of a path allows, or nearly does: with
a value of another type or size in some place, a field too few, or one too many.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

# What stands where something else should.
WRONG: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, 5e-324, 2**31, 2**63, -(2**63) - 1, 2**200),
    *("", " ", "a", "auto", "1", "NaN", "true", "\x00", "\u2028", "\U0001f384" * 9, "x" * 2000),
    *("<|im_end|>", "<|im_start|>system\n", "<tool_call>", "{{ 7 * 7 }}", "{% raw %}", "../../x"),
    *([], [None], [[]], ["a"], [0], [-1], [2**40], [[0], "a"], list(range(40)), [["a"] * 3] * 3),
    *({}, {"": 0}, {"a": None}, {"type": 1}, {"type": "text"}, {"type": "text", "text": 5}),
    *({"type": {}}, {"__class__": "x"}, {"type": "function", "function": {"name": "f"}}),
)
DEEP: Any = json.loads("[" * 90 + "]" * 90)
_LONGEST_LIST = 3


class Bodies:
    """Bodies for the paths of an OpenAPI document.

    Args:
        openapi: the document.
    """

    def __init__(self, openapi: Mapping[str, Any]):
        self._schemas = openapi["components"]["schemas"]
        self._bodies = {
            path: methods["post"]["requestBody"]["content"]["application/json"]["schema"]
            for path, methods in openapi["paths"].items()
            if "requestBody" in methods.get("post", {})
        }

    @property
    def paths(self) -> tuple[str, ...]:
        """Those that take a body."""
        return tuple(self._bodies)

    def fields(self, path: str) -> dict[str, Any]:
        """The fields of a path's body, with their schemas."""
        found: dict[str, Any] = self._resolved(self._bodies[path])["properties"]
        return found

    def body(self, path: str, draw: random.Random) -> Any:
        """One body; four of five have a fault or several."""
        body = self._value(self._bodies[path], draw, 0)
        if "model" in body:
            body["model"] = "demo"
        for _ in range(draw.choice((0, 1, 1, 1, 3))):
            body = mutated(body, draw)
        return body

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        while "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        return schema

    def _value(self, schema: Mapping[str, Any], draw: random.Random, depth: int) -> Any:
        schema = self._resolved(schema)
        for several in ("anyOf", "oneOf"):
            if several in schema:
                return self._value(draw.choice(schema[several]), draw, depth)
        if "const" in schema or "enum" in schema:
            return draw.choice(schema.get("enum") or [schema["const"]])
        make = {
            "object": self._object,
            "array": self._array,
            "string": _string,
            "integer": _integer,
            "number": _number,
            "boolean": lambda schema, draw, depth: draw.random() < 0.5,
            "null": lambda schema, draw, depth: None,
        }.get(schema.get("type", ""))
        return draw.choice(WRONG) if make is None else make(schema, draw, depth)

    def _object(self, schema: Mapping[str, Any], draw: random.Random, depth: int) -> Any:
        needed, share = schema.get("required", ()), draw.choice((0.0, 0.05, 0.4))
        return {
            name: self._value(inner, draw, depth + 1)
            for name, inner in schema.get("properties", {}).items()
            if name in needed or name == "content" or draw.random() < share
        } or ({} if depth else {"prompt": "Hello"})

    def _array(self, schema: Mapping[str, Any], draw: random.Random, depth: int) -> Any:
        least, most = schema.get("minItems", 0), schema.get("maxItems", _LONGEST_LIST)
        count = draw.randint(least, max(least, min(most, _LONGEST_LIST)))
        return [self._value(schema.get("items", {}), draw, depth + 1) for _ in range(count)]


def _string(schema: Mapping[str, Any], draw: random.Random, depth: int) -> str:
    texts = [one for one in WRONG if isinstance(one, str)]
    text: str = draw.choice(["Hello", "demo", "f", "{}", *texts])
    return text[: schema.get("maxLength")].ljust(schema.get("minLength", 0), "x")


def _integer(schema: Mapping[str, Any], draw: random.Random, depth: int) -> int:
    return int(_number(schema, draw, depth, (0, 1, 2, 5, 100, 2**31 - 1, 2**62)))


def _number(
    schema: Mapping[str, Any],
    draw: random.Random,
    depth: int,
    values: tuple[float, ...] = (0, 1, 0.5, 2, -1.5, 1e-300, 1e300),
) -> float:
    least = schema.get("minimum", schema.get("exclusiveMinimum", -(2**63)))
    most = schema.get("maximum", schema.get("exclusiveMaximum", 2**63))
    return draw.choice([one for one in (*values, least, most) if least <= one <= most])


def mutated(body: Any, draw: random.Random) -> Any:
    """The body with a fault in one of its places."""
    body = json.loads(json.dumps(body))
    places = list(_places(body)) if isinstance(body, dict | list) else []
    holder, key = draw.choice(places) if places else (None, None)
    wrong = DEEP if draw.random() < 0.02 else draw.choice(WRONG)
    if holder is None:
        return wrong
    how = draw.randrange(8)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[draw.choice(("", "nonsense", "model ", str(key).upper(), "__proto__"))] = wrong
    elif how == 2 and isinstance(holder, list):
        holder.extend([holder[key]] * draw.choice((1, 40)))
    else:
        holder[key] = wrong
    return body


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All places in a value: what holds it, and where there."""
    found = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, inner in found:
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """JSON text with some of its bytes altered: hardly ever JSON any more."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(data) + 1)
        piece = draw.choice(
            (b"", b"\xff", b"\x00", b"\xed\xa0\x80", b"\\ud800", b"NaN", b"1e999", b"{", b"]" * 99)
        )
        data[at : at + draw.choice((0, 1, 5))] = piece
    return bytes(data)
