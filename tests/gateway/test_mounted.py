"""The gateway within an application of somebody else."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp

from queue_service import App
from queue_service.errors import ConfigError
from queue_service.gateway import Gateway
from tests.gateway.served import named, serving
from tests.support import eventually


def under_starlette(gateway: Gateway) -> ASGIApp:
    return Starlette(routes=[Mount("/agents", routes=gateway.routes())], lifespan=gateway.lifespan)


def under_fastapi(gateway: Gateway) -> ASGIApp:
    made = FastAPI(lifespan=gateway.lifespan)

    @made.get("/own")
    async def own() -> str:
        return "mine"

    made.mount("/agents", Starlette(routes=gateway.routes()))
    return made


def in_fastapi_itself(gateway: Gateway) -> ASGIApp:
    made = FastAPI(lifespan=gateway.lifespan)
    made.router.routes.extend(gateway.routes())
    return made


@pytest.mark.parametrize(
    ("mount", "prefix"), [(under_starlette, "/agents"), (under_fastapi, "/agents"), (in_fastapi_itself, "")]
)
async def test_a_conversation_is_held_wherever_it_is_mounted(app: App, mount: object, prefix: str) -> None:
    assert callable(mount)
    gateway = Gateway(app, authorize=named)
    async with serving(app, gateway=gateway, asgi=mount(gateway)) as served, served.client(prefix=prefix) as client:
        async with client.connected("?stream=ann/a") as (stream, connection_id):
            sent = {"stream": "ann/a", "client_message_id": "m", "body": {}}
            assert (await client.post("send", connection_id, sent)).status_code == 202
            assert (await stream.event())["kind"] == "message"
        await eventually(lambda: gateway.connections == 0)


async def test_it_cannot_be_entered_twice(app: App) -> None:
    gateway = Gateway(app, authorize=named)
    async with gateway:
        with pytest.raises(ConfigError, match="already"):
            await gateway.__aenter__()


async def test_without_being_entered_it_answers_that_it_is_not_running(app: App) -> None:
    gateway = Gateway(app, authorize=named)
    async with serving(app, gateway=gateway, asgi=Starlette(routes=gateway.routes())) as served:
        async with served.client() as client:
            assert (await client.get("/healthz")).status_code == 503
