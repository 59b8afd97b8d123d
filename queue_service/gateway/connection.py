"""One client's connection: the streams it watches, and the bytes to send to it.

It pulls: what the client has not taken yet stays in the streams' tails and in the database, so a slow client holds no
memory and slows nobody. Whatever was pulled and not delivered is pulled again by the next connection, whose cursors are the
client's own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from functools import partial

from queue_service.db.execute import NOT_EXECUTED
from queue_service.gateway import frames
from queue_service.gateway.access import Principal
from queue_service.logs import get_logger
from queue_service.replicas.model import Change
from queue_service.services.fanout import Fanout, Follower

log = get_logger(__name__)


class Watched:
    """A stream of a connection. Leaving it is `leave`."""

    def __init__(self, fanout: Fanout, stream: str, cursor: int, *, max_gap: int, moved: Callable[[], None]) -> None:
        self._leave = contextlib.ExitStack()
        tail = self._leave.enter_context(fanout.watch(stream))
        self.follower = Follower(fanout, tail, cursor, max_gap=max_gap)
        tail.moved.listeners.add(moved)
        self._leave.callback(tail.moved.listeners.discard, moved)

    def leave(self) -> None:
        self._leave.close()


class Connection:
    def __init__(
        self,
        connection_id: str,
        fanout: Fanout,
        principal: Principal,
        *,
        heartbeat: float,
        beat: bytes,
        max_gap: int,
        retry: Callable[[], float],
    ) -> None:
        self.id = connection_id
        self.principal = principal
        self._fanout = fanout
        self._heartbeat = heartbeat
        self._beat = beat
        self._max_gap = max_gap
        self._retry = retry
        self._watched: dict[str, Watched] = {}
        # Streams that may have something for us.
        self._ready: dict[str, None] = {}
        self._wake = asyncio.Event()
        # Why we leave, and whether the last stream that was watched has ended.
        self._reason: str | None = None
        self._over = False
        self._is_closed = False

    @property
    def streams(self) -> list[str]:
        return list(self._watched)

    def watch(self, stream: str, cursor: int) -> None:
        """Send the events of a stream after a cursor from now on; one that is watched already goes back or on to there."""
        if self._is_closed:
            # A POST outlived its connection. What it would watch now, nobody would ever leave.
            return
        self.unwatch(stream)
        self._over = False
        moved = partial(self._moved, stream)
        self._watched[stream] = Watched(self._fanout, stream, cursor, max_gap=self._max_gap, moved=moved)
        moved()

    def unwatch(self, stream: str) -> None:
        watched = self._watched.pop(stream, None)
        if watched is not None:
            watched.leave()

    def watch_only(self, cursors: Mapping[str, int]) -> None:
        for stream in self._watched.keys() - cursors.keys():
            self.unwatch(stream)
        for stream, cursor in cursors.items():
            self.watch(stream, cursor)

    def change(self, change: Change) -> None:
        """Do what a POST asks for, which may have come to another replica."""
        if change.kind == "only":
            self.watch_only(change.cursors)
            return
        for stream, cursor in change.cursors.items():
            if change.kind == "watch":
                self.watch(stream, cursor)
            else:
                self.unwatch(stream)

    def leave(self, reason: str) -> None:
        """Say goodbye, and end."""
        self._reason = self._reason or reason
        self._wake.set()

    def close(self) -> None:
        self.watch_only({})
        self._is_closed = True

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """What to send: frames, as many at a time as there are. Ends with the streams, or as it was asked to."""
        places = {stream: watched.follower.cursor for stream, watched in self._watched.items()}
        welcome = {"connection_id": self.id, "heartbeat": self._heartbeat, "streams": places}
        yield frames.control("welcome", welcome, retry=self._retry())
        while not self._over:
            if self._reason is not None:
                yield frames.control("goodbye", {"reason": self._reason}, retry=self._retry())
                return
            self._wake.clear()
            chunk = await self._pull()
            if chunk:
                yield chunk
            elif not self._ready and not await self._woken():
                yield self._beat

    async def _pull(self) -> bytes:
        """A page of each stream that has something."""
        ready, self._ready = self._ready, {}
        parts: list[bytes] = []
        for stream in ready:
            watched = self._watched.get(stream)
            if watched is None:
                continue
            try:
                events = await watched.follower.take()
            except NOT_EXECUTED as lost:
                log.warning("streams cannot be followed; its client has to come again", why=str(lost))
                self.leave("unavailable")
                return b"".join(parts)
            if self._watched.get(stream) is not watched:
                # It was left, or watched from another place, while we read.
                continue
            if events:
                parts += map(frames.event, events)
                self._moved(stream)
            elif watched.follower.is_over:
                self.unwatch(stream)
                self._over = not self._watched
                parts.append(frames.control("end", {"stream": stream, "head": watched.follower.cursor}))
        return b"".join(parts)

    def _moved(self, stream: str) -> None:
        self._ready[stream] = None
        self._wake.set()

    async def _woken(self) -> bool:
        """False: nothing happened for as long as a client is to go without hearing of us."""
        try:
            async with asyncio.timeout(self._heartbeat):
                await self._wake.wait()
        except TimeoutError:
            return False
        return True
