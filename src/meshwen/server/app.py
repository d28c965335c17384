# SPDX-License-Identifier: Apache-2.0
"""The application: routes, and what a client is told when something goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

import meshwen
from meshwen.common.arguments import brief
from meshwen.errors import MeshwenError
from meshwen.server.asgi import error_response, route_path
from meshwen.server.errors import ApiError
from meshwen.server.http_guard import HttpGuard
from meshwen.server.options import ServerOptions
from meshwen.server.request_log import RequestLog
from meshwen.server.serving import Serving

# Modules of `meshwen.server` that have a `router`.
ROUTERS: tuple[str, ...] = (
    "admin",
    "page",
    "tokenize",
    "chat",
    "completions",
    "tokens",
    "messages",
    "responses",
)

# The document of the interface: what an error is like.
_ERRORS: dict[str, Any] = {
    "description": "An error, in the shape of the interface's others",
    "content": {"application/json": {"schema": {"type": "object", "required": ["error"]}}},
}


def create_app(serving: Serving) -> FastAPI:
    """The application that serves a model.

    Args:
        serving: what the handlers share; they find it at `request.app.state.serving`.
    """
    app = FastAPI(
        title="meshwen",
        version=meshwen.__version__,
        docs_url=None,  # Its page would load scripts from elsewhere.
        redoc_url=None,
        redirect_slashes=False,
        responses={"4XX": _ERRORS, "5XX": _ERRORS},
        exception_handlers={
            ApiError: _refused,
            MeshwenError: _refused,
            RequestValidationError: _invalid,
            HTTPException: _no_such,
        },
    )
    app.state.serving = serving
    for router in _routers():
        app.include_router(router)
    _add_layers(app, serving.options)
    return app


def _add_layers(app: FastAPI, options: ServerOptions) -> None:
    """What a request passes through before its handler; the last one added is the first."""
    app.add_middleware(HttpGuard, options.api_keys(), int(options.max_body_size))
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(RequestLog, options.access_log)


def _routers() -> list[Any]:
    from importlib import import_module

    return [import_module(f"meshwen.server.{name}").router for name in ROUTERS]


async def _refused(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        error = ApiError(400, str(error))
    return error_response(route_path(request.scope), error)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(route_path(request.scope), validation_error(error.errors()))


def validation_error(found: Sequence[Any]) -> ApiError:
    """What pydantic found wrong, in one line with the field's path; the first of several.

    Args:
        found: pydantic's errors.
    """
    first = found[0]
    where, _, kind = first["loc"], first["msg"], first["type"]
    param = _path(where[1:] if where and where[0] in ("body", "query", "path") else where)
    if kind == "extra_forbidden":
        return ApiError(400, f"{param} is not supported", param=param, code="unknown_parameter")
    if kind == "missing":
        what = f"{param} is missing" if param else "the request has no body; send a JSON object"
        return ApiError(400, what, param=param or None, code="missing_required_parameter")
    text = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if kind not in ("value_error", "assertion_error"):
        text = f"{text[:1].lower()}{text[1:]}, not {brief(first.get('input'))}"
    return ApiError(400, f"{param or 'the body'}: {text}", param=param or None)


def _path(where: Sequence[int | str]) -> str:
    """A field's path: "messages[0].content"."""
    path = ""
    for step in where:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    return path


async def _no_such(request: Request, error: Exception) -> Response:
    """404, 405 and what else the framework refuses by itself."""
    assert isinstance(error, HTTPException)
    path, method = route_path(request.scope), request.method
    text = {
        404: f"there is no path {brief(path)}",
        405: f"{brief(path)} does not take {method}",
    }.get(error.status_code, str(error.detail or HTTPStatus(error.status_code).phrase))
    return error_response(path, ApiError(error.status_code, text, headers=error.headers))
