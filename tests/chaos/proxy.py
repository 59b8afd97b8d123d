"""A TCP proxy that cuts, stalls and half-closes what passes through it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Proxy:
    """In front of `target`, a port of this machine, or the path of a socket. `faults` counts what was done to connections.
    One that sends `swallowed_after` gets no answer any more, and nobody hears what else it sends; one that sends `refused` is
    cut."""

    def __init__(self, target: int | str) -> None:
        self.target = target
        self.swallowed_after: bytes | None = None
        self.refused: bytes | None = None
        self._silent: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self.port = 0
        self.faults = {"cut": 0, "stalled": 0, "half-closed": 0, "silenced": 0}
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
            if isinstance(self.target, int):
                beyond, to_beyond = await asyncio.open_connection("127.0.0.1", self.target)
            else:
                beyond, to_beyond = await asyncio.open_unix_connection(self.target)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, to_beyond)
        self._pairs.add(pair)
        try:
            await asyncio.gather(self._pump(reader, to_beyond, pair), self._pump(beyond, writer, pair))
        finally:
            self._pairs.discard(pair)
            self._silent.discard(pair)
            for each in pair:
                each.transport.abort()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            while data := await reader.read(65_536):
                await self._flows.wait()
                if self.refused is not None and self.refused in data:
                    pair[0].transport.abort()
                    break
                if pair in self._silent:
                    continue
                if self.swallowed_after is not None and self.swallowed_after in data and writer is pair[1]:
                    self.faults["silenced"] += 1
                    self._silent.add(pair)
                writer.write(data)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
