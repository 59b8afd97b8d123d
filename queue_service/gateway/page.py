"""The bundled page: a conversation, its connection, and nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

STATIC = Path(__file__).parent / "static"
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def routes() -> list[BaseRoute]:
    """The page at `/`, its modules at `/static`."""
    return [Route("/", _index, methods=["GET"]), Mount("/static", _Static(directory=STATIC))]


class _Static(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        # Asked for anew each time, and mostly not sent: the modules of two versions must not meet.
        response = super().file_response(*args, **kwargs)
        response.headers.update(PAGE_HEADERS)
        return response


async def _index(request: Request) -> Response:
    del request
    return FileResponse(STATIC / "index.html", headers=PAGE_HEADERS)
