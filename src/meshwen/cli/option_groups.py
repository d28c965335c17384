# SPDX-License-Identifier: Apache-2.0
"""Options that several commands take together, as one object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any


def with_groups(**groups: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a command so that some of its parameters are groups of options.

    typer takes one option from each parameter of a function's signature, and has no place for a
    parameter that stands for several: so the decorated function gets a signature in which it does.
    Nothing else in the package sets one.

    Args:
        groups: by the command's parameter, a function whose own parameters are the options, as
            typer declares them, and which makes of their values what the command is to get. They
            stand in the parameter's place; at the end where the signature lacks it, as that of a
            wrapper is the one of what it wraps.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = _parameters(command)
        options = {name: _parameters(make) for name, make in groups.items()}
        shown: dict[str, Parameter] = {}
        for name, parameter in own.items():
            shown |= options.get(name, {name: parameter})
        for name in groups:
            shown |= {} if name in own else options[name]

        @wraps(command)
        def run(**given: Any) -> Any:
            for name, make in groups.items():
                given[name] = make(**{option: given.pop(option) for option in options[name]})
            return command(**given)

        return _show(run, shown.values())

    return decorate


def group(make: Callable[..., Any], options: Mapping[str, tuple[Any, Any]]) -> Callable[..., Any]:
    """A group for `with_groups`: `make` gets the options, each an annotation and a default."""

    def run(**given: Any) -> Any:
        return make(**given)

    return _show(
        run,
        (
            Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in options.items()
        ),
    )


def _parameters(function: Callable[..., Any]) -> dict[str, Parameter]:
    """A function's parameters by name, with annotations that are no strings, given by name."""
    return {
        name: parameter.replace(kind=Parameter.KEYWORD_ONLY)
        for name, parameter in signature(function, eval_str=True).parameters.items()
    }


def _show(function: Callable[..., Any], parameters: Iterable[Parameter]) -> Callable[..., Any]:
    """The function, which appears to have these parameters."""
    shown = Signature(list(parameters))
    function.__signature__ = shown  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in shown.parameters.values()}
    return function
