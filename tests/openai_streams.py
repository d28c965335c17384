# SPDX-License-Identifier: Apache-2.0
"""Reads OpenAI's responses and streams, for tests."""

from __future__ import annotations

import json
from typing import Any


def events(text: str) -> list[str]:
    """The data of a stream's events, comments left out; checks that each ends as it must."""
    assert text.endswith("\n\n"), text[-80:]
    found = [event for event in text[:-2].split("\n\n") if not event.startswith(":")]
    assert all(event.startswith("data: ") and "\n" not in event for event in found), found
    return [event.removeprefix("data: ") for event in found]


def chunks(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream that ended well."""
    *found, last = events(text)
    assert last == "[DONE]"
    return [json.loads(one) for one in found]


def without_id(body: Any) -> Any:
    """A response without what differs between two of the same request."""
    return {k: v for k, v in body.items() if k not in ("id", "created", "request_id")}


def choices(found: list[dict[str, Any]], index: int) -> list[dict[str, Any]]:
    """A choice's part of each chunk that has one."""
    return [one for chunk in found for one in chunk["choices"] if one["index"] == index]
