"""A gateway on a real socket, and a client that reads what comes over it, frame by frame."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import uvicorn
from starlette.requests import Request
from starlette.types import ASGIApp

from queue_service import App
from queue_service.gateway import Gateway, Principal


def named(request: Request) -> Principal | None:
    """Whoever says their name in `X-User`. Everyone owns `shared`, and the streams that begin with their name and a slash."""
    user = request.headers.get("x-user")
    if user is None:
        return None
    return Principal(user, lambda stream: stream == "shared" or stream.startswith(f"{user}/"), organization_id="org")


@dataclass
class Frame:
    event: str = "message"
    id: str | None = None
    data: Any = None
    retry: int | None = None
    comment: str | None = None


@dataclass
class Stream:
    """A connection that is open. `frames` are those that were read so far, heartbeats left out."""

    response: httpx2.Response
    lines: AsyncIterator[str]
    frames: list[Frame] = field(default_factory=list)
    beats: int = 0

    async def next(self) -> Frame | None:
        """The next frame; None where the response has ended."""
        async with asyncio.timeout(60):
            frame: Frame | None = None
            async for line in self.lines:
                if not line:
                    if frame is None:
                        continue
                    self.frames.append(frame)
                    return frame
                name, _, value = line.partition(": ")
                if not name:
                    self.beats += 1
                    continue
                frame = frame or Frame()
                setattr(frame, name, json.loads(value) if name in {"data", "retry"} else value)
            return None

    async def event(self) -> dict[str, Any]:
        """The data of the next event of a stream."""
        frame = await self.next()
        assert frame is not None
        assert frame.event == "message", frame
        assert frame.id == f"{frame.data['stream']}:{frame.data['seq']}"
        data: dict[str, Any] = frame.data
        return data

    async def until(self, *events: str) -> Frame:
        """The next frame of one of these types."""
        while (frame := await self.next()) is not None:
            if frame.event in events:
                return frame
        raise AssertionError(f"the response ended before {events}")


async def lines_of(response: httpx2.Response) -> AsyncIterator[str]:
    """Lines as the format has them. The client's own reader also ends them where Unicode would."""
    rest = b""
    async for data in response.aiter_raw():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            assert b"\r" not in line
            yield line.decode()


@dataclass
class Client:
    """One person's browser, so to speak."""

    http: httpx2.AsyncClient
    user: str = "ann"

    @property
    def headers(self) -> dict[str, str]:
        return {"x-user": self.user}

    @asynccontextmanager
    async def connected(
        self, query: str = "", *, headers: Mapping[str, str | bytes] | None = None
    ) -> AsyncIterator[tuple[Stream, str]]:
        """A connection, and its id."""
        own = {**self.headers, **(headers or {})}
        sent = [(name.encode(), value if isinstance(value, bytes) else value.encode()) for name, value in own.items()]
        async with self.http.stream("GET", f"/api/chat/events{query}", headers=sent) as response:
            assert response.status_code == 200, await response.aread()
            stream = Stream(response, lines_of(response))
            welcome = await stream.next()
            assert welcome is not None
            assert welcome.event == "welcome"
            yield stream, welcome.data["connection_id"]

    async def get(self, path: str, **headers: str) -> httpx2.Response:
        return await self.http.get(path, headers={**self.headers, **headers})

    async def post(self, name: str, connection_id: str | None, body: Any, **headers: str) -> httpx2.Response:
        own = {} if connection_id is None else {"x-connection-id": connection_id}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.http.post(f"/api/chat/{name}", content=content, headers={**self.headers, **own, **headers})


# Without TLS nobody is asked for a certificate, and to load those of the system takes longer than most of these tests.
TRUSTING_NOBODY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@dataclass
class Served:
    """A gateway that is being served."""

    gateway: Gateway
    server: uvicorn.Server
    address: str

    @asynccontextmanager
    async def client(self, user: str = "ann", *, prefix: str = "") -> AsyncIterator[Client]:
        limits = httpx2.Limits(max_connections=None)
        address = self.address + prefix
        async with httpx2.AsyncClient(base_url=address, timeout=60, limits=limits, verify=TRUSTING_NOBODY) as http:
            yield Client(http, user)


@asynccontextmanager
async def serving(
    app: App, *, gateway: Gateway | None = None, asgi: ASGIApp | None = None, **options: Any
) -> AsyncIterator[Served]:
    """Serve a gateway of this App on a port of its own, for the length of the block."""
    gateway = gateway or Gateway(app, **{"authorize": named, "retry": (0.05, 0.1), **options})
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    config = uvicorn.Config(
        asgi or gateway.asgi(), log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=10
    )
    server = _Server(config)
    running = asyncio.create_task(_quietly(server, listening))
    while not server.started:
        await asyncio.sleep(0.001)  # until it serves
        assert not running.done(), "the server did not start"
    try:
        yield Served(gateway, server, f"http://127.0.0.1:{listening.getsockname()[1]}")
    finally:
        gateway.drain()
        server.should_exit = True
        await running
        listening.close()


class _Server(uvicorn.Server):
    """It ends soon after it is asked to: hundreds of tests wait for one each."""

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # noqa: ASYNC110 - it is asked by a flag
            await asyncio.sleep(0.01)


async def _quietly(server: uvicorn.Server, listening: socket.socket) -> None:
    """Without the server's own handlers of signals, which are for one server to a process."""
    await server._serve([listening])
