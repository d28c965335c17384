# SPDX-License-Identifier: Apache-2.0
"""Certificates as files: their declared shape, and what tells that one is whole and unchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import MinLen
from typing_extensions import TypedDict

from meshwen.common.choices import DType, Numerics, Quantization
from meshwen.common.json_files import TokenId, check_shape, read_json, to_json
from meshwen.errors import MeshwenError

FORMAT = "meshwen-certificate-2"
_HASH = "content_sha256"
_HINT = "give a file that this version's verify --json wrote"

Certificate = dict[str, Any]
_Tokens = Annotated[list[Annotated[list[TokenId], MinLen(1)]], MinLen(1)]


class _Header(TypedDict):
    format: Literal["meshwen-certificate-2"]


class _LogitHashes(TypedDict):
    whole: list[str]
    cached: list[str]


class _Row(TypedDict):
    mesh: str
    numerics: Numerics
    products: NotRequired[str]  # Older certificates have none.
    logits_sha256: _LogitHashes
    hlo_sha256: str


class _Content(TypedDict):
    """What a certificate must have to be run again and compared."""

    ok: bool
    broken: list[str]
    weights_sha256: str
    dtype: DType
    quantization: NotRequired[Quantization | None]
    numerics: Annotated[list[Numerics], MinLen(1)]
    meshes: Annotated[list[str], MinLen(1)]
    prompts: _Tokens
    tokens: _Tokens
    generated: dict[Numerics, _Tokens]
    rows: list[_Row]
    environment: dict[str, str]
    content_sha256: str


def with_hash(content: Mapping[str, Any]) -> Certificate:
    """A certificate with the SHA-256 of all its other fields."""
    return {**content, _HASH: _content_sha256(content)}


def as_json(found: Certificate) -> str:
    """A certificate's text; what is no finite number becomes null."""
    return to_json(found, indent=1) + "\n"


def read_certificate(path: Path) -> Certificate:
    """A certificate from a file.

    Its hash covers every field. It tells damage and careless edits, and is no signature; so what
    the fields must agree on is checked besides.

    Raises:
        MeshwenError: it cannot be read, is no certificate, was edited, or contradicts itself.
    """
    content = read_json(path, dict[str, Any], hint=_HINT)
    for shape in (_Header, _Content):
        check_shape(content, shape, str(path), hint=_HINT)
    if content[_HASH] != _content_sha256(content):
        raise MeshwenError(f"{path}: {_HASH} is not that of the content, which was edited: {_HINT}")
    if problem := _contradiction(content):
        raise MeshwenError(f"{path}: {problem}: {_HINT}")
    return content


def _content_sha256(content: Mapping[str, Any]) -> str:
    covered = {key: value for key, value in content.items() if key != _HASH}
    return hashlib.sha256(to_json(covered, sort_keys=True).encode()).hexdigest()


def _contradiction(content: Certificate) -> str | None:
    """What two fields of a certificate do not agree on."""
    prompts, tokens = len(content["prompts"]), content["tokens"]
    steps = len(tokens[0])
    for key, rows in [("tokens", tokens), *_items("generated", content["generated"])]:
        if [len(row) for row in rows] != [steps] * prompts:
            return f"{key} does not have {steps} tokens for each of {prompts} prompts"
    if set(content["generated"]) != set(content["numerics"]):
        return "generated does not have the tokens of each of numerics"
    pairs = [(numerics, mesh) for numerics in content["numerics"] for mesh in content["meshes"]]
    if [(row["numerics"], row["mesh"]) for row in content["rows"]] != pairs:
        return "rows does not have each of numerics on each of meshes"
    for at, row in enumerate(content["rows"]):
        for key, hashes in _items(f"rows[{at}].logits_sha256", row["logits_sha256"]):
            if len(hashes) != prompts:
                return f"{key} does not have a hash for each of {prompts} prompts"
    return None if content["ok"] == (not content["broken"]) else "ok does not say what broken says"


def _items(key: str, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(f"{key}.{name}", value) for name, value in values.items()]
