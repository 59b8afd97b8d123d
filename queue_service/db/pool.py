"""A pool of sessions.

Nobody meets a connection that has died while it was idle, or that takes no writes any more: it is looked at before it is
lent. In an outage one task tries to connect, at its own pace, however many wait; once it succeeds, all that is wanted is
opened. Giving a connection back never waits, so that whoever is cancelled loses none.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol, TypeVar

import psycopg
from psycopg import errors as pg

from queue_service.backoff import Pauses
from queue_service.db.execute import DEADLINE, persistently, translated, unanswered
from queue_service.db.meaning import took_too_much
from queue_service.db.query import Query
from queue_service.db.session import Address, Limits, Session, connect
from queue_service.errors import DatabaseUnavailable
from queue_service.logs import get_logger

T = TypeVar("T")

log = get_logger(__name__)

# Between two tries to connect.
FIRST_PAUSE, MAX_PAUSE = 0.05, 0.5
# All but one of the connections are closed where they were not used for so many seconds.
IDLE = 3.0
# So many are opened as soon as they are wanted, and more only where somebody has waited for so many seconds: what comes at
# the same moment once, as when a worker starts, is done sooner than a connection is opened.
READY, GROW = 2, 0.020
# How long a connection that is looked at may take to answer, in seconds.
LOOK = 1.0

IDLE_SESSION_TIMEOUT = "57P05"
SHORT_OF_TIME = (pg.QueryCanceled, pg.LockNotAvailable)

OURS = Limits()


def none_free(seconds: float) -> DatabaseUnavailable:
    return DatabaseUnavailable(
        f"No connection became free within {max(seconds, 0):.3g} s. The server may be down, or QUEUE_SERVICE_POOL_SIZE too "
        "small for what this process does at once."
    )


class Fetcher(Protocol):
    """Whatever runs one query at a time: a place in a pool, or a connection of its own."""

    async def fetch(self, query: Query[T], *, deadline: float = DEADLINE) -> T: ...


class _Client:
    """Somebody who waits for a connection."""

    __slots__ = ("future", "is_reserved", "since")

    def __init__(self, *, is_reserved: bool) -> None:
        self.future: asyncio.Future[Session] = asyncio.get_running_loop().create_future()
        self.is_reserved = is_reserved
        self.since = time.monotonic()


class Pool:
    """At most `size` connections at once, and one more for each place that is `reserved`. `fetch` runs one query on any of
    them; `connection` lends one out."""

    def __init__(self, where: str | Address, *, size: int, application: str = "queue_service") -> None:
        self._address = Address.of(where)
        self._application = application
        self._size = size
        self._places = 0
        #: Of what is fetched by those without a place.
        self.limits = OURS
        # All there are, and those that nobody uses: the one that was given back last is lent first.
        self._open: set[Session] = set()
        self._idle: deque[Session] = deque()
        # How many are lent to clients without a place.
        self._lent = 0
        # Who waits: those with a place do not stand in line behind the others.
        self._first: deque[_Client] = deque()
        self._line: deque[_Client] = deque()
        self._connecting: set[asyncio.Task[None]] = set()
        # (monotonic) What was not looked at since then may take no writes any more.
        self._doubted_at = 0.0
        # Why there is no connection; None: the last try succeeded.
        self._lost: DatabaseUnavailable | None = None
        self._trimming: asyncio.TimerHandle | None = None
        self._growing: asyncio.TimerHandle | None = None
        self.is_closed = False

    async def open(self) -> None:
        """Begin to connect. A wrong address is not noticed here, but at the first use."""
        self._connect(1)

    async def close(self) -> None:
        """Close what is idle now, and the others when they are given back. Whoever waits is told so."""
        self.is_closed = True
        for timer in (self._trimming, self._growing):
            if timer is not None:
                timer.cancel()
        self._fail(_closed(), [self._first, self._line])
        while self._idle:
            self._discard(self._idle.pop())
        for task in self._connecting:
            task.cancel()
        if self._connecting:
            await asyncio.wait(self._connecting)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Session]:
        """Raises DatabaseUnavailable where none becomes free in time."""
        conn = await self._take(self.limits, DEADLINE, is_reserved=False)
        try:
            yield conn
        finally:
            self._give(conn, is_reserved=False)

    async def fetch(self, query: Query[T], *, deadline: float = DEADLINE) -> T:
        """Within `deadline` seconds, or DatabaseUnavailable is raised."""
        return await self._fetch(query, self.limits, deadline, is_reserved=False)

    async def fetch_on_any(self, query: Query[T]) -> T:
        """As `fetch`, within whatever limits the next connection has, and only where they are too narrow within our own: to
        change them takes a round trip."""
        return await self._fetch(query, None, DEADLINE, is_reserved=False)

    def reserved(self, limits: Limits | None = OURS) -> Place:
        """A place for one coroutine, which never waits behind others. None: within any limits, as `fetch_on_any`."""
        self._places += 1
        return Place(self, limits)

    async def _fetch(self, query: Query[T], limits: Limits | None, deadline: float, *, is_reserved: bool) -> T:
        until = time.monotonic() + deadline
        while True:
            conn = await self._take(limits, until - time.monotonic(), is_reserved=is_reserved)
            try:
                return await self._run(conn, query, limits, until - time.monotonic())
            except DatabaseUnavailable as lost:
                cause = lost.__cause__
                if conn.closed or isinstance(cause, pg.ReadOnlySqlTransaction):
                    self._doubt(conn)
                if limits is None and conn.limits != self.limits and isinstance(cause, SHORT_OF_TIME):
                    # It has changed nothing within the limits of others: again, within ours.
                    limits = self.limits
                elif not conn.closed or not _was_not_executed(query, cause):
                    raise
            finally:
                self._give(conn, is_reserved=is_reserved)

    async def _run(self, conn: Session, query: Query[T], limits: Limits | None, deadline: float) -> T:
        if limits is None or conn.limits == limits:
            return await persistently(conn, query, deadline)
        # Behind a pooler, whose sessions are not ours.
        try:
            async with asyncio.timeout(deadline):
                with translated():
                    async with conn.transaction():
                        await conn.limit(limits)
                        return await persistently(conn, query, deadline)
        except TimeoutError:
            raise unanswered(deadline) from None

    # Lending

    async def _take(self, limits: Limits | None, deadline: float, *, is_reserved: bool) -> Session:
        while not self.is_closed:
            if self._idle and (is_reserved or self._lent < self._size):
                conn = self._pick(limits)
                self._lent += not is_reserved
            else:
                conn = await self._wait(_Client(is_reserved=is_reserved), deadline)
            is_good = False
            try:
                is_good = await self._is_good(conn, limits)
            finally:
                if not is_good:
                    conn.pgconn.finish()
                    self._give(conn, is_reserved=is_reserved)
            if is_good:
                return conn
        raise _closed()

    def _pick(self, limits: Limits | None) -> Session:
        for conn in reversed(self._idle):
            if limits is None or conn.limits == limits or conn.is_pooled:
                self._idle.remove(conn)
                return conn
        # Another connection would have to plan every statement anew.
        return self._idle.pop()

    async def _is_good(self, conn: Session, limits: Limits | None) -> bool:
        if not conn.is_usable:
            return False
        if (not conn.is_quiet or conn.known_at < self._doubted_at) and not await conn.is_writable():
            return False
        if limits is not None and conn.limits != limits and not conn.is_pooled:
            try:
                async with asyncio.timeout(LOOK):
                    await conn.limit(limits)
            except (psycopg.Error, TimeoutError):
                return False
        return True

    async def _wait(self, client: _Client, deadline: float) -> Session:
        (self._first if client.is_reserved else self._line).append(client)
        self._open_for_those_who_wait()
        try:
            async with asyncio.timeout(deadline):
                return await client.future
        except TimeoutError:
            self._withdraw(client)
            raise (DatabaseUnavailable(str(self._lost)) if self._lost is not None else none_free(deadline)) from None
        except BaseException:
            self._withdraw(client)
            raise

    def _withdraw(self, client: _Client) -> None:
        """It waits no longer, and gives back what it was given at the moment in which it was cancelled."""
        with suppress(ValueError):
            (self._first if client.is_reserved else self._line).remove(client)
        future = client.future
        if future.done() and not future.cancelled() and future.exception() is None:
            self._give(future.result(), is_reserved=client.is_reserved)

    def _give(self, conn: Session, *, is_reserved: bool) -> None:
        """Never waits."""
        self._lent -= not is_reserved
        if self.is_closed or not conn.is_usable:
            self._discard(conn)
        else:
            self._put(conn)
        self._serve()

    def _put(self, conn: Session) -> None:
        conn.idle_since = time.monotonic()
        self._idle.append(conn)
        if self._trimming is None and len(self._idle) > 1:
            self._trimming = asyncio.get_running_loop().call_later(IDLE, self._trim)

    def _serve(self) -> None:
        """Give what is idle to those who wait, and connect for the others."""
        while self._idle and (client := self._next_client()):
            self._lent += not client.is_reserved
            client.future.set_result(self._idle.pop())
        self._open_for_those_who_wait()

    def _next_client(self) -> _Client | None:
        """The first who may have one."""
        for line in (self._first, self._line):
            while line and (line is self._first or self._lent < self._size):
                client = line.popleft()
                # One that was cancelled has not heard of it yet.
                if not client.future.done():
                    return client
        return None

    # Opening and closing

    def _open_for_those_who_wait(self) -> None:
        ready = min(len(self._line), READY - self._lent) if self._open else len(self._line)
        if wanted := len(self._first) + max(ready, 0):
            self._connect(wanted - len(self._connecting))
        if self._line and self._growing is None and not self.is_closed:
            self._growing = asyncio.get_running_loop().call_later(GROW, self._grow)

    def _grow(self) -> None:
        self._growing = None
        if self._line and time.monotonic() - self._line[0].since > GROW * 0.9:
            self._connect(len(self._line) - len(self._connecting))
        if self._line:
            self._growing = asyncio.get_running_loop().call_later(GROW, self._grow)

    def _connect(self, wanted: int) -> None:
        """Begin to open so many more, as far as there is room for them; in an outage one at a time."""
        room = self._size + self._places - len(self._open) - len(self._connecting)
        if self._lost is not None:
            room = min(room, 1 - len(self._connecting))
        if not self.is_closed:
            for _ in range(min(wanted, room)):
                task = asyncio.create_task(self._reach(), name="connecting")
                self._connecting.add(task)
                task.add_done_callback(self._connecting.discard)

    async def _reach(self) -> None:
        """Open one, however long that takes, for as long as somebody waits for it."""
        pauses = Pauses(FIRST_PAUSE, MAX_PAUSE, jitter=random.random)
        while True:
            try:
                conn = await connect(self._address, application=self._application, limits=self.limits)
            except DatabaseUnavailable as lost:
                if self._lost is None:
                    log.warning("cannot connect to the database; trying until it works", why=str(lost))
                self._lost = lost
                if not self._open:
                    # Who has a place has a pace of its own, and says of itself that it does not get on.
                    self._fail(lost, [self._first])
            except Exception as refused:  # noqa: BLE001 - for those who wait to hear
                self._fail(refused, [self._first, self._line])
                return
            else:
                if self._lost is not None:
                    log.info("connected to the database again")
                self._lost = None
                self._open.add(conn)
                self._put(conn)
                self._serve()
                return
            if len(self._connecting) > 1 or not self._is_waited_for():
                self._connecting -= {asyncio.current_task()}
                return
            await asyncio.sleep(pauses.next())

    def _doubt(self, conn: Session) -> None:
        """It takes no writes, or has ended under a statement, as where the server says nothing any more. It is closed, and
        the others are looked at before they are lent again."""
        self._doubted_at = time.monotonic()
        conn.pgconn.finish()

    def _discard(self, conn: Session) -> None:
        self._open.discard(conn)
        conn.pgconn.finish()

    def _trim(self) -> None:
        """Close what was not used for a while. One stays."""
        self._trimming = None
        now = time.monotonic()
        while len(self._idle) > 1 and now - self._idle[0].idle_since > IDLE * 0.9:
            self._discard(self._idle.popleft())
        if len(self._idle) > 1:
            self._trimming = asyncio.get_running_loop().call_later(IDLE, self._trim)

    def _is_waited_for(self) -> bool:
        return not all(client.future.done() for client in (*self._first, *self._line))

    def _fail(self, error: Exception, lines: Sequence[deque[_Client]]) -> None:
        for line in lines:
            while line:
                client = line.popleft()
                if not client.future.done():
                    client.future.set_exception(error)


class Place:
    """In a pool: for one coroutine, whose statements may have limits of their own. Where there is no connection at all, and
    a try to connect fails, so does what it fetches: it has to try again itself."""

    def __init__(self, pool: Pool, limits: Limits | None) -> None:
        self._pool = pool
        self._limits = limits

    async def fetch(self, query: Query[T], *, deadline: float = DEADLINE) -> T:
        return await self._pool._fetch(query, self._limits, deadline, is_reserved=True)  # noqa: SLF001

    def leave(self) -> None:
        """Once."""
        self._pool._places -= 1  # noqa: SLF001


def _was_not_executed(query: Query[Any], lost: BaseException | None) -> bool:
    """Of a statement on a connection that was lost: whether to send it again is right. The server ends a session that was
    idle for too long; and what writes nothing may be executed twice, if it was not ended for how long it took."""
    if not isinstance(lost, psycopg.Error):
        return False
    return lost.sqlstate == IDLE_SESSION_TIMEOUT or (not query.writes and not took_too_much(lost))


def _closed() -> DatabaseUnavailable:
    return DatabaseUnavailable("The connections of this App were closed.")
