# SPDX-License-Identifier: Apache-2.0
"""Commands that take the parameters of two functions: typer reads them from the signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Any, get_type_hints


def parameters_of(function: Callable[..., Any]) -> list[Parameter]:
    """A function's parameters, with annotations that are no strings any more."""
    hints = get_type_hints(function, include_extras=True)
    return [
        parameter.replace(annotation=hints[name])
        for name, parameter in signature(function).parameters.items()
    ]


def set_parameters(function: Callable[..., Any], parameters: Sequence[Parameter]) -> None:
    """Makes a function appear to have these, all given by name."""
    named = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in parameters]
    function.__signature__ = signature(function).replace(  # type: ignore[attr-defined]
        parameters=named
    )
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in named}
