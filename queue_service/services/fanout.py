"""Follows streams for the whole process: one subscription, one reader, any number of followers.

Each watched stream has a tail here: its latest events, read once however many follow it. A follower takes from the tail
at its own pace, and reads from the database what the tail no longer holds; so a slow one costs nobody memory or time.

Nothing depends on a notice: when listening begins, again after every gap in it, and on every poll, the heads of all
watched streams are compared with what was read.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from queue_service.db import channels
from queue_service.db.execute import NOT_EXECUTED
from queue_service.db.listener import Listener, NoticesMissed
from queue_service.db.query import Query
from queue_service.errors import DatabaseUnavailable
from queue_service.events import queries
from queue_service.events.model import Event, StreamState, gap
from queue_service.logs import get_logger
from queue_service.services.loop import Service, Services

log = get_logger(__name__)

TAIL_LENGTH = 500
READ_PAGE = 200
# Streams that are not expected to move are looked at on every so many polls.
QUIET_POLLS = 10
READ_PAUSE = 0.1
NOTICES_SERVICE, POLLS_SERVICE, READING_SERVICE = "notices of events", "polls of streams", "reading of streams"


class Wakeup:
    """Wakes everyone who took its `next` before it, and calls `listeners` each time."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.listeners: set[Callable[[], None]] = set()

    def next(self) -> asyncio.Event:
        return self._event

    def wake(self) -> None:
        event, self._event = self._event, asyncio.Event()
        event.set()
        for listener in self.listeners:
            listener()


class Tail:
    """The latest events of one stream: those after `base`, up to `head`. Before the first look both are None."""

    def __init__(self, stream: str) -> None:
        self.stream = stream
        self.events: deque[Event] = deque()
        self.base: int | None = None
        self.head: int | None = None
        # The highest head that was heard of; what lies between is about to be read.
        self.top = 0
        self.state = StreamState.CREATED
        self.watchers = 0
        # How often the database went back: those who follow have to look again where they are.
        self.setbacks = 0
        self.moved = Wakeup()
        self.ended_turns = Wakeup()

    def place(self, head: int) -> None:
        """Begin anew: what came up to this is not kept here. A turn may have ended before, so whoever waits looks again."""
        self.events.clear()
        self.base = self.head = head
        self.touch()

    def set_back(self, head: int) -> None:
        """The database lost what came after this: it was restored, or failed over."""
        self.top = head
        self.setbacks += 1
        self.place(head)

    def extend(self, events: Collection[Event]) -> None:
        for event in events:
            # Two reads may overlap.
            if self.head is not None and event.seq > self.head:
                self.events.append(event)
                self.head = event.seq
        while len(self.events) > TAIL_LENGTH:
            self.base = self.events.popleft().seq
        self.moved.wake()
        if any(event.terminal for event in events):
            self.ended_turns.wake()

    def touch(self) -> None:
        self.moved.wake()
        self.ended_turns.wake()

    def is_over(self, cursor: int) -> bool:
        return self.state is StreamState.ENDED and cursor >= self.top

    def since(self, cursor: int) -> list[Event] | None:
        """The events after a cursor; None if they are not all here."""
        if self.base is None or cursor < self.base:
            return None
        return [event for event in self.events if event.seq > cursor]


class Follower:
    """One reader's place in a stream that is watched. `cursor` is the seq it was last given.

    With `max_gap`, a place that is further behind the head is given up for one that is as far behind, and a `gap` event
    says what was left out.
    """

    def __init__(self, fanout: Fanout, tail: Tail, after: int, *, max_gap: int | None = None) -> None:
        self.cursor = after
        self._fanout = fanout
        self._tail = tail
        self._max_gap = max_gap
        # The head as it was at the first look, and what the tail had been through by then.
        self._head: int | None = None
        self._setbacks = tail.setbacks

    @property
    def is_over(self) -> bool:
        return self._tail.is_over(self.cursor)

    @property
    def head(self) -> int:
        """The highest head that was heard of."""
        return max(self._head or 0, self._tail.top, self._tail.head or 0)

    async def take(self) -> list[Event]:
        """What there is after the cursor, which moves past it: a page of it at most, [] where there is nothing now. Raises
        DatabaseUnavailable where the watch has ended, or the database cannot be reached at the first look."""
        tail, given = self._tail, []
        if self._setbacks != tail.setbacks:
            self._setbacks, self._head = tail.setbacks, None
        if self._head is None:
            given = await self._first_look()
        if self._max_gap is not None and self.head - self.cursor > self._max_gap:
            given.append(self._skip(self.head - self._max_gap))
        head_before = tail.head
        events = tail.since(self.cursor)
        if events is None:
            events = await self._fanout.stored(tail.stream, self.cursor)
        for event in events:
            if event.seq > self.cursor + 1:
                given.append(self._skip(event.seq - 1))
            given.append(event)
            self.cursor = event.seq
        if not given and head_before is not None and self.cursor < head_before:
            # Nothing is stored up to a head that was known before the look: it was all trimmed away.
            given.append(self._skip(head_before))
        return given

    async def _first_look(self) -> list[Event]:
        tail = self._tail
        # A place beyond what is known here may be right all the same: another process reads its own tail.
        known = tail.head if tail.head is not None and self.cursor <= tail.head else None
        self._head = known if known is not None else await self._fanout.head(tail.stream)
        if self.cursor <= self._head:
            return []
        # The caller saw events that this database never had: it was restored, or failed over.
        missing, self.cursor = self.cursor, self._head
        return [gap(tail.stream, self._head + 1, missing, self._head)]

    def _skip(self, upto: int) -> Event:
        first, self.cursor = self.cursor + 1, upto
        return gap(self._tail.stream, first, upto, max(self.head, upto))


class Fanout:
    """Reads and polls in `services`, from the first stream on that is watched."""

    def __init__(
        self,
        fetch: Callable[[Query[Any]], Awaitable[Any]],
        listener: Listener,
        services: Services,
        *,
        poll_interval: float,
    ) -> None:
        self._fetch = fetch
        self._listener = listener
        self._poll_interval = poll_interval
        self._tails: dict[str, Tail] = {}
        # Streams whose tails have to be read, and those whose heads have to be compared first.
        self._behind: set[str] = set()
        self._doubtful: set[str] = set()
        self._wake = asyncio.Event()
        self._services = services
        self._is_closed = False

    @contextmanager
    def watch(self, stream: str) -> Iterator[Tail]:
        """The tail of a stream, kept up to date for the length of the block."""
        self._services.ensure(NOTICES_SERVICE, self._listen)
        self._services.ensure(POLLS_SERVICE, self._poll)
        self._services.ensure(READING_SERVICE, self._read)
        tail = self._tails.get(stream)
        if tail is None:
            tail = self._tails[stream] = Tail(stream)
            self._doubt([stream])
        tail.watchers += 1
        try:
            yield tail
        finally:
            tail.watchers -= 1
            if not tail.watchers:
                self._tails.pop(stream, None)

    async def follow(self, stream: str, after: int) -> AsyncGenerator[Event, None]:
        """Events after a cursor, first those that are stored, then each as it comes. Where some are stored no longer, a
        `gap` event says which. Ends where the stream has ended. Raises DatabaseUnavailable where the watch has ended.
        """
        with self.watch(stream) as tail:
            follower = Follower(self, tail, after)
            while True:
                moved = tail.moved.next()
                events = await follower.take()
                for event in events:
                    yield event
                if not events and follower.is_over:
                    return
                if not events:
                    await self.woken(moved)

    async def head(self, stream: str) -> int:
        known = await self._fetch(queries.stream(stream))
        return known.head if known is not None else 0

    async def stored(self, stream: str, cursor: int) -> list[Event]:
        """A page of what is stored after the cursor, however long the database takes to come back."""
        while True:
            try:
                page: list[Event] = await self._fetch(queries.read(stream, after=cursor, limit=READ_PAGE))
            except NOT_EXECUTED as lost:
                self.check()
                log.debug("cannot replay a stream; trying again", why=str(lost))
                await asyncio.sleep(READ_PAUSE)
            else:
                return page

    async def woken(self, wakeup: asyncio.Event) -> None:
        """Wait for a wakeup of a tail. Raises DatabaseUnavailable where the App was closed, and nobody wakes anyone."""
        if not self._is_closed:
            await wakeup.wait()
        self.check()

    def check(self) -> None:
        """Raise DatabaseUnavailable where the App was closed."""
        if self._is_closed:
            raise DatabaseUnavailable("Streams are followed no longer: this App was closed.")

    def close(self) -> None:
        """Wake everyone who follows, to be told so."""
        self._is_closed = True
        for tail in self._tails.values():
            tail.touch()

    async def _listen(self, service: Service) -> None:
        with self._listener.subscribed(channels.EVENTS) as notices:
            async for heard in notices:
                if isinstance(heard, NoticesMissed) or (appended := channels.read_appended(heard.payload)) is None:
                    # Not every ending has an event: a discharged turn has none, and its notice may be what was lost.
                    for tail in self._tails.values():
                        tail.ended_turns.wake()
                    self._doubt(self._tails)
                else:
                    self._appended(*appended)
                service.well()

    def _appended(self, stream: str, seq: int) -> None:
        """A notice: the stream has come to this event."""
        tail = self._tails.get(stream)
        if tail is None:
            return
        if tail.head is not None and seq > tail.head:
            self._behind.add(stream)
            self._wake.set()
        else:
            # Nothing new to read, so something else is: a state, or a turn that ended without an event.
            tail.ended_turns.wake()
            self._doubt([stream])

    async def _poll(self, service: Service) -> None:
        polls = quiet = 0
        while True:
            await asyncio.sleep(self._poll_interval)
            polls += 1
            quiet = 0 if self._tails else quiet + 1
            if quiet > QUIET_POLLS:
                # Or each event of every stream would wake this process for nothing.
                for name in (NOTICES_SERVICE, READING_SERVICE, POLLS_SERVICE):
                    self._services.stop(name)
            everywhere = polls % QUIET_POLLS == 0
            self._doubt([name for name, tail in self._tails.items() if everywhere or tail.state.catches_up])
            service.well()

    def _doubt(self, streams: Collection[str]) -> None:
        self._doubtful.update(streams)
        self._wake.set()

    async def _read(self, service: Service) -> None:
        """Read for all streams at once, as often as there is something to read."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                if self._doubtful:
                    await self._compare()
                if self._behind:
                    await self._catch_up()
            except Exception as lost:  # noqa: BLE001 - the next look may go through
                service.failed(lost)
                self._doubt(self._tails)
                await asyncio.sleep(READ_PAUSE)
            else:
                service.well()

    async def _compare(self) -> None:
        names, self._doubtful = self._doubtful & self._tails.keys(), set()
        if not names:
            return
        heads = await self._fetch(queries.heads(sorted(names)))
        for name in names:
            tail = self._tails.get(name)
            if tail is None:
                continue
            head, state = heads.get(name, (0, StreamState.CREATED))
            if tail.head is not None and head < tail.head:
                tail.set_back(head)
            tail.top = max(tail.top, head)
            if tail.head is None:
                tail.place(head)
            elif head > tail.head:
                self._behind.add(name)
            changed, tail.state = tail.state is not state, state
            if changed:
                tail.touch()

    async def _catch_up(self) -> None:
        names, self._behind = self._behind, set()
        cursors = {name: tail.head for name in names if (tail := self._tails.get(name)) and tail.head is not None}
        if not cursors:
            return
        found: dict[str, list[Event]] = {name: [] for name in cursors}
        for event in await self._fetch(queries.tails(cursors, limit=READ_PAGE)):
            found[event.stream].append(event)
        for name, events in found.items():
            tail = self._tails.get(name)
            if tail is not None and events:
                tail.extend(events)
            if len(events) == READ_PAGE:
                self._behind.add(name)
                self._wake.set()
            elif tail is not None and tail.head is not None and tail.head < tail.top:
                # That head was read from the stream before: what leads up to it was trimmed away.
                tail.place(tail.top)
