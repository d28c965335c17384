# SPDX-License-Identifier: Apache-2.0
"""What is asked about the server: its health, version, metrics and models; and tokens of texts."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

import meshwen
from meshwen.server.fields import check_model
from meshwen.server.serving import Serving

router = APIRouter()


def _serving(request: Request) -> Serving:
    found: Serving = request.app.state.serving
    return found


@router.get("/health")
@router.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)
async def health(request: Request) -> Response:
    """200 where requests are answered; 503 where the engine fails all the time."""
    healthy = _serving(request).engine.healthy
    return JSONResponse({"status": "ok" if healthy else "failed"}, 200 if healthy else 503)


@router.get("/version")
async def version(request: Request) -> dict[str, str]:
    """Of the package, and what decides the bits of an answer."""
    serving = _serving(request)
    return {"version": meshwen.__version__, "system_fingerprint": serving.fingerprint}


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(_serving(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The model, under each of its names."""
    serving = _serving(request)
    return {"object": "list", "data": [_model(serving, name) for name in serving.names]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """The model, under one of its names."""
    serving = _serving(request)
    check_model(serving, name)
    return _model(serving, name)


def _model(serving: Serving, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "meshwen",
        "root": serving.names[0],
        "parent": None,
        "max_model_len": serving.max_model_len,
    }
