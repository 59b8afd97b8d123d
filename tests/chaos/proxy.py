"""A TCP proxy that cuts, stalls and half-closes what passes through it, or is an outage of what is behind it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

# What an outage looks like to whoever connects: refused, as where nothing listens; reset once it is accepted; accepted and
# never answered, then or later; or answered slowly.
Outage = Literal["refuse", "reset", "swallow", "slow"]
SLOWLY = 0.1


class Proxy:
    """In front of `target`, a port of this machine or the path of a socket. `faults` counts what was done to connections,
    `accepted` says when each came (monotonic). One that sends `swallowed_after` gets no answer any more, and nobody hears what
    else it sends; one that sends `refused` is cut."""

    def __init__(self, target: int | str) -> None:
        self.target = target
        self.swallowed_after: bytes | None = None
        self.refused: bytes | None = None
        self.port = 0
        self.faults = {"cut": 0, "stalled": 0, "half-closed": 0, "silenced": 0}
        self.accepted: list[float] = []
        self._outage: Outage | None = None
        self._server: asyncio.Server | None = None
        # Those that say nothing any more, whatever comes.
        self._mute: set[asyncio.StreamWriter] = set()
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._flows = asyncio.Event()
        self._flows.set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Proxy]:
        await self._listen()
        try:
            yield self
        finally:
            self._flows.set()
            if self._server is not None:
                self._server.close()
            for pair in list(self._pairs):
                for writer in pair:
                    writer.transport.abort()
            for writer in list(self._mute):
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

    async def fail(self, kind: Outage, seconds: float) -> None:
        """What is behind is gone for so long. What was connected before is reset, or with `swallow` hears nothing until it is
        over, and is reset then."""
        self._outage = kind
        if kind == "refuse" and self._server is not None:
            self._server.close()
        if kind == "swallow":
            self._flows.clear()
        elif kind != "slow":
            self.cut(1.0)
        try:
            await asyncio.sleep(seconds)  # the fault itself
        finally:
            self._outage = None
            if kind == "refuse":
                await self._listen()
            if kind == "swallow":
                self.cut(1.0)
                self._flows.set()

    def forget(self) -> None:
        """What is connected now hears nothing any more, and is not ended either. What comes is passed on."""
        for pair in self._pairs:
            self._mute.update(pair)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    def _some(self, share: float) -> list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]]:
        return [pair for pair in self._pairs if random.random() < share]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted.append(time.monotonic())
        if self._outage == "reset":
            writer.transport.abort()
            return
        if self._outage == "swallow":
            self._mute.add(writer)
            with contextlib.suppress(OSError):
                await reader.read()
            return
        try:
            beyond, to_beyond = await self._reach()
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, to_beyond)
        self._pairs.add(pair)
        try:
            await asyncio.gather(self._pump(reader, to_beyond, pair), self._pump(beyond, writer, pair))
        finally:
            self._pairs.discard(pair)
            self._mute.difference_update(pair)
            for each in pair:
                each.transport.abort()

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self.target, str):
            return await asyncio.open_unix_connection(self.target)
        return await asyncio.open_connection("127.0.0.1", self.target)

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            while data := await reader.read(65_536):
                await self._flows.wait()
                if self._outage == "slow":
                    await asyncio.sleep(SLOWLY)  # the fault itself
                if self.refused is not None and self.refused in data:
                    pair[0].transport.abort()
                    break
                if writer in self._mute:
                    continue
                if self.swallowed_after is not None and self.swallowed_after in data and writer is pair[1]:
                    self.faults["silenced"] += 1
                    self._mute.update(pair)
                writer.write(data)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
