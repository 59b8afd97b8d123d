"""A TCP proxy that cuts, stalls and half-closes what passes through it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Proxy:
    """In front of `target`, a port of this machine. `faults` counts what was done to connections."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.faults = {"cut": 0, "stalled": 0, "half-closed": 0}
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._flows = asyncio.Event()
        self._flows.set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Proxy]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            self._flows.set()
            server.close()
            for pair in list(self._pairs):
                for writer in pair:
                    writer.transport.abort()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut(self, share: float) -> None:
        """Reset this share of the connections."""
        for pair in self._some(share):
            self.faults["cut"] += 1
            for writer in pair:
                writer.transport.abort()

    def half_close(self, share: float) -> None:
        """End one direction of this share of the connections, and leave the other open."""
        for pair in self._some(share):
            self.faults["half-closed"] += 1
            with contextlib.suppress(OSError, RuntimeError):
                random.choice(pair).write_eof()

    async def stall(self, seconds: float) -> None:
        """Pass nothing on for so long, or until cancelled."""
        self.faults["stalled"] += len(self._pairs)
        self._flows.clear()
        try:
            await asyncio.sleep(seconds)  # the fault itself
        finally:
            self._flows.set()

    def _some(self, share: float) -> list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]]:
        return [pair for pair in self._pairs if random.random() < share]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            beyond, to_beyond = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, to_beyond)
        self._pairs.add(pair)
        try:
            await asyncio.gather(self._pump(reader, to_beyond), self._pump(beyond, writer))
        finally:
            self._pairs.discard(pair)
            for each in pair:
                each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            while data := await reader.read(65_536):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
