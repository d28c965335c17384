# SPDX-License-Identifier: Apache-2.0
"""Objects of requests that say by their `type` what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError, WrapValidator

from meshwen.server.chat_models import ChatRequest
from meshwen.server.errors import ApiError
from meshwen.server.fields import Fields


def tagged(kinds: Mapping[str, type[Fields]], what: str, default: str | None = None) -> Any:
    """Reads an object as what its `type` says; refuses other types by their name.

    Args:
        kinds: the models, by type.
        what: what such an object is: "a content block".
        default: the type of an object that names none.
    """

    def read(value: Any, _: Callable[[Any], Any]) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError(f"must be {what}, an object with a type")
        kind = value.get("type", default)
        if not isinstance(kind, str) or kind not in kinds:
            known = ", ".join(kinds)
            named = "a type is missing" if kind is None else f"type {str(kind)[:40]!r}"
            raise ValueError(f"{named}: {what} is one of {known} here")
        return kinds[kind].model_validate(value)

    return WrapValidator(read)


def text_or(items: Any) -> Any:
    """Reads text, or a list of items.

    Args:
        items: the type of an item.
    """
    adapter: TypeAdapter[Any] = TypeAdapter(list[items])

    def read(value: Any, _: Callable[[Any], Any]) -> Any:
        if isinstance(value, list):
            return adapter.validate_python(value)
        if isinstance(value, str):
            return value
        raise ValueError("must be text or a list")

    return WrapValidator(read)


def as_chat(fields: Mapping[str, Any]) -> ChatRequest:
    """The request for a chat completion that asks the same as another protocol's.

    Args:
        fields: its fields; None: not given.

    Raises:
        RequestValidationError: they do not go together.
    """
    try:
        return ChatRequest.model_validate({k: v for k, v in fields.items() if v is not None})
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


@contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Names another protocol's fields in errors about the chat completion that asks the same.

    Args:
        names: by a field of the chat completion, the field that has its value.
    """
    try:
        yield
    except ApiError as error:
        field = (error.param or "").split(".")[0].split("[")[0]
        if error.param is None or field not in names:
            raise
        raise ApiError(
            error.status,
            error.message.replace(error.param, names[field]).replace(field, names[field]),
            param=names[field],
            code=error.code,
        ) from None
