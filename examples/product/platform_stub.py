"""A stand-in for a bot platform: it shows messages in channels, knows a key again, edits, and refuses calls with 429."""

from __future__ import annotations

import itertools
import random

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

REFUSED = 0.2

ids = itertools.count(1)
# By id: the channel, the key, and all that the message has said.
shown: dict[str, tuple[str, str, list[str]]] = {}
by_key: dict[tuple[str, str], str] = {}


def too_many() -> Response | None:
    return Response(status_code=429, headers={"Retry-After": "0.2"}) if random.random() < REFUSED else None  # noqa: S311


async def post(request: Request) -> Response:
    if refused := too_many():
        return refused
    message = await request.json()
    key = (message["channel"], message["key"])
    if key not in by_key:
        by_key[key] = str(next(ids))
        shown[by_key[key]] = (*key, [])
    shown[by_key[key]][2].append(message["text"])
    return JSONResponse({"id": by_key[key]})


async def edit(request: Request) -> Response:
    if refused := too_many():
        return refused
    message_id = request.path_params["id"]
    shown[message_id][2].append((await request.json())["text"])
    return JSONResponse({"id": message_id})


async def everything(request: Request) -> Response:
    del request
    return JSONResponse([{"channel": each[0], "key": each[1], "texts": each[2]} for each in shown.values()])


web = Starlette(
    routes=[
        Route("/messages", post, methods=["POST"]),
        Route("/messages/{id}", edit, methods=["PUT"]),
        Route("/messages", everything, methods=["GET"]),
    ]
)
