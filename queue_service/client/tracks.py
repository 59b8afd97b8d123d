"""The streams that are followed. Each event of a stream is delivered once and in the order of `seq`; what is missing in
between is read from the history, and what is not there any more is announced as a `gap`.

A cursor moves only when its event is in the buffer, and only one task delivers events of a stream at a time: whoever reads
the connection, or the backfill, whose presence makes that one pass by.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from queue_service.client.buffer import Buffer
from queue_service.client.timing import Timing
from queue_service.client.wire import HISTORY_LIMIT, End, Gap, HistoryPage, Wire
from queue_service.errors import SendFailed
from queue_service.events.model import Event, gap
from queue_service.logs import get_logger

log = get_logger(__name__)

# Backfills that ask at a time; the others wait with empty hands.
ASKING = 4


class Track:
    """One stream. Everything up to `cursor` is in the buffer, and up to `given` was handed to the reader; `wanted` is the
    last event that is known to be missing."""

    def __init__(self, stream: str, cursor: int) -> None:
        self.stream = stream
        self.cursor = self.given = self.wanted = cursor
        # The gateway knows, or learns with the next `reconnect`.
        self.is_settled = False
        self.has_ended = False
        self.backfill: asyncio.Task[None] | None = None

    @property
    def is_filling(self) -> bool:
        return self.backfill is not None and not self.backfill.done()

    def stop(self) -> None:
        if self.backfill is not None:
            self.backfill.cancel()
            self.backfill = None


# An event, its track, and the cursor after it.
Delivered = tuple[Track, Event, int]


class Tracks:
    def __init__(self, wire: Wire, buffer: Buffer[Delivered], timing: Timing) -> None:
        # Starts a task that does not die unnoticed.
        self.spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
        self._wire = wire
        self._buffer = buffer
        self._timing = timing
        self._asking = asyncio.Semaphore(ASKING)
        self._tracks: dict[str, Track] = {}

    # Which streams

    def add(self, stream: str, cursor: int) -> Track:
        """The stream's track: the one there is, where it is, or a new one."""
        return self._tracks.setdefault(stream, Track(stream, cursor))

    def remove(self, stream: str) -> None:
        track = self._tracks.pop(stream, None)
        if track is not None:
            track.stop()

    def keep_only(self, stream: str) -> None:
        for other in self._tracks.keys() - {stream}:
            self.remove(other)

    def is_current(self, track: Track) -> bool:
        return self._tracks.get(track.stream) is track

    def given(self) -> dict[str, int]:
        """Where to go on after this process ends: what was not handed to the reader is not counted."""
        return {stream: track.given for stream, track in self._tracks.items()}

    def settled(self) -> dict[str, int]:
        """Where the gateway has to go on, in the streams that are followed for good."""
        return {stream: track.cursor for stream, track in self._tracks.items() if track.is_settled}

    @property
    def all_ended(self) -> bool:
        return bool(self._tracks) and all(track.has_ended for track in self._tracks.values())

    # What comes

    async def take(self, event: Event) -> None:
        """An event as it comes. Twice is nothing new, and of a stream that is not followed nobody wants any."""
        track = self._tracks.get(event.stream)
        if track is None or event.seq <= track.cursor:
            return
        if track.is_filling or event.seq > track.cursor + 1:
            # It is stored too, so the backfill will find it; kept here, such events could be any number.
            self._want(track, event.seq)
        else:
            await self._deliver(track, event, event.seq)

    async def skip(self, missed: Gap) -> None:
        """The gateway does not send these events here."""
        track = self._tracks.get(missed.stream)
        if track is None:
            return
        if missed.last <= missed.head:
            self._want(track, missed.last)
            return
        # The database was restored, and counts on from its head. Nothing beyond that is missing.
        track.wanted = missed.head
        if track.cursor > missed.head:
            track.stop()
            await self._deliver(track, gap(missed.stream, missed.first, missed.last, missed.head), missed.head)
        # The gateway may say this twice, once for each place that names the stream: we may lack what was appended between.
        self._want(track, missed.head)

    def end(self, end: End) -> None:
        """The stream has ended, and the gateway believes that all of it was sent."""
        track = self._tracks.get(end.stream)
        if track is not None:
            self._want(track, end.head)
            track.has_ended = True

    # What is missing

    def _want(self, track: Track, upto: int) -> None:
        track.wanted = max(track.wanted, upto)
        if track.wanted > track.cursor and not track.is_filling:
            track.backfill = self.spawn(self._backfill(track))

    async def _backfill(self, track: Track) -> None:
        pauses = self._timing.pauses()
        while track.cursor < track.wanted:
            wanted, before = track.wanted, track.cursor
            try:
                async with self._asking:
                    page = await self._wire.history(track.stream, track.cursor)
            except SendFailed as failed:
                log.warning("cannot read the history of a stream; trying again", stream=track.stream, why=str(failed))
                await asyncio.sleep(pauses.next(floor=failed.retry_after))
                continue
            await self._deliver_page(track, page, wanted)
            if track.cursor > before:
                pauses.reset()
            else:
                await asyncio.sleep(pauses.next())

    async def _deliver_page(self, track: Track, page: HistoryPage, wanted: int) -> None:
        for event in page.events:
            if event.seq <= track.cursor:
                continue
            if event.seq > track.cursor + 1:
                await self._deliver_gap(track, event.seq - 1, page.head)
            await self._deliver(track, event, event.seq)
        # What was known to be there before we asked, and is not in a page that had room for it, was trimmed away. A head
        # below that is another matter: a copy of the database that is behind, and has it later.
        if len(page.events) < HISTORY_LIMIT and track.cursor < wanted <= page.head:
            await self._deliver_gap(track, wanted, page.head)

    async def _deliver_gap(self, track: Track, last: int, head: int) -> None:
        await self._deliver(track, gap(track.stream, track.cursor + 1, last, head), last)

    async def _deliver(self, track: Track, event: Event, cursor: int) -> None:
        await self._buffer.put((track, event, cursor))
        track.cursor = cursor
