"""A round-robin balancer without stickiness: each request goes to the next replica, whoever asks."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager


class Balancer:
    """In front of `targets`, ports of this machine. `taken` says of each request its path and the port that answered. A
    port that nobody listens on is stepped over."""

    def __init__(self, targets: Sequence[int]) -> None:
        self.port = 0
        self.taken: list[tuple[str, int]] = []
        self._targets = itertools.cycle(targets)
        self._count = len(targets)
        self._handling: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ports(self, name: str) -> list[int]:
        """Which ports answered the requests whose path ends like this, in order."""
        return [port for path, port in self.taken if path.endswith(name)]

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Balancer]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for handling in list(self._handling):
                handling.cancel()
            await asyncio.gather(*self._handling, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handling = asyncio.current_task()
        assert handling is not None
        self._handling.add(handling)
        handling.add_done_callback(self._handling.discard)
        # Cancelled at the end of the test: who started this task asks it for no more than an error.
        ends = (OSError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*ends), contextlib.closing(writer.transport):
            await self._pass_on(reader, writer)
            await writer.drain()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, and no other on this connection, as the replica says in its answer."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = re.search(r"^content-length: *(\d+)", head, re.IGNORECASE | re.MULTILINE)
        body = await reader.readexactly(int(length[1])) if length else b""
        line, _, headers = head.partition("\r\n")
        others = re.sub(r"^(?:connection|keep-alive):.*\r\n", "", headers, flags=re.IGNORECASE | re.MULTILINE)
        beyond, to_beyond = await self._connected(line.split()[1].partition("?")[0])
        with contextlib.closing(to_beyond.transport):
            to_beyond.write(f"{line}\r\nConnection: close\r\n{others}".encode("latin-1") + body)
            answering = asyncio.create_task(_pump(beyond, writer))
            # A client that goes away: its replica is to hear of it.
            leaving = asyncio.create_task(reader.read())
            try:
                await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in (answering, leaving):
                    each.cancel()
                await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _connected(self, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        for port in itertools.islice(self._targets, self._count):
            with contextlib.suppress(ConnectionRefusedError):
                found = await asyncio.open_connection("127.0.0.1", port)
                self.taken.append((path, port))
                return found
        raise ConnectionRefusedError("no replica is there")


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
