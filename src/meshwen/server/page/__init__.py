# SPDX-License-Identifier: Apache-2.0
"""The page at `/`: a chat in the browser, and what the engine is doing.

Its files are served as they are: nothing is built, and nothing is fetched from elsewhere. The
content security policy allows its own files alone, and forbids scripts to make elements of text.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from meshwen.server.page.state import engine_state
from meshwen.server.serving import Serving

_POLICY = "; ".join(
    (
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect")),
        *(f"{what} 'none'" for what in ("base-uri", "form-action", "frame-ancestors")),
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
router = APIRouter(include_in_schema=False)


@router.get("/")
async def index() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/page/state")
async def state(request: Request) -> dict[str, Any]:
    """What the engine is doing, for the page."""
    serving: Serving = request.app.state.serving
    return engine_state(serving)


@router.get("/page/{name}")
async def file(name: str) -> Response:
    """A file that the page consists of."""
    if name not in _files():
        raise HTTPException(404)
    return _file(name)


@cache
def _files() -> dict[str, bytes]:
    """The page's files by name."""
    return {
        one.name: one.read_bytes()
        for one in resources.files(__name__).iterdir()
        if one.name.rpartition(".")[2] in _TYPES
    }


def _file(name: str) -> Response:
    kind = _TYPES[name.rpartition(".")[2]]
    return Response(_files()[name], headers=_HEADERS, media_type=kind)
