"""The response that a connection is: it sends what the connection has, until that ends or the client is gone.

Written here and not taken from a library, since the whole of it is these few lines, and those we looked at keep tasks of
gone clients or a flag for all servers of the process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from queue_service.gateway.connection import Connection
from queue_service.logs import get_logger

log = get_logger(__name__)

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store, no-transform"),
    # Proxies that gather what they pass on would hold events back.
    (b"x-accel-buffering", b"no"),
]


class EventResponse(Response):
    """A write that takes longer than `stall` seconds ends it. `ended` is called at the end, whatever brought it."""

    def __init__(self, connection: Connection, *, stall: float, ended: Callable[[], None]) -> None:
        super().__init__()
        self._connection = connection
        self._stall = stall
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        writing = asyncio.create_task(self._write(send), name="event stream")
        gone = asyncio.create_task(_disconnected(receive), name="event stream's end")
        try:
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            writing.cancel()
            gone.cancel()
            await asyncio.gather(writing, gone, return_exceptions=True)
            self._ended()
        if not writing.cancelled():
            writing.result()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        async for chunk in self._connection.chunks():
            try:
                async with asyncio.timeout(self._stall):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except TimeoutError:
                # It loses nothing: what it did not take is stored, and it comes again with the cursors it has.
                log.warning("a client does not read; dropping its connection", principal=self._connection.principal.id)
                return
        await send({"type": "http.response.body", "body": b""})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
