"""LISTEN on one connection for the whole process, kept alive, and honest about what it may have missed.

Whoever wants notices subscribes to channels. The connection listens to what somebody is subscribed to, and ends where
nobody is for a while. Each subscriber has a queue of its own, so one that is slow hurts itself only. A `NoticesMissed` says
"notices may have been lost: read again". One comes first, once listening has begun (so that whoever reads upon it misses
nothing that is committed later), after every reconnection, and in the place of what a full queue cannot hold.

Behind a transaction pooler LISTEN does nothing, so nothing is tried there: all is found by polling, unless a direct
address for notices is given. A notice that is sent by way of the other address then has to be heard there, or they lead to
different databases.
"""

from __future__ import annotations

import asyncio
import functools
import random
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

import psycopg
from psycopg import sql

from queue_service.backoff import Pauses
from queue_service.db.channels import ECHO, Notice, notify
from queue_service.db.execute import NOT_EXECUTED, translated
from queue_service.db.query import Query
from queue_service.db.session import Address, Session, connect
from queue_service.errors import DatabaseUnavailable
from queue_service.logs import get_logger

log = get_logger(__name__)

# A connection that answers neither notices nor a question for this long is given up.
PING_INTERVAL = 10.0
PING_DEADLINE = 5.0
FIRST_PAUSE, MAX_PAUSE = 0.05, 1.0
# Where the address for notices leads elsewhere, somebody has to change it: that takes time.
MISDIRECTED_PAUSE = 30.0
# Notices that wait for one subscriber.
MAX_WAITING = 10_000
# The connection stays for so many seconds without a subscriber: the next one may come soon.
LINGER = 10.0


@dataclass(frozen=True, slots=True)
class NoticesMissed:
    pass


class Misdirected(DatabaseUnavailable):
    """The address for notices leads to another database than the one for all else."""


class Notices:
    """What one subscriber has not read yet. Iterating gives each notice as it comes, for ever."""

    def __init__(self) -> None:
        self._waiting: deque[Notice] = deque()
        self._has_missed = False
        self._some = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[Notice | NoticesMissed]:
        return self

    async def __anext__(self) -> Notice | NoticesMissed:
        while not (self._has_missed or self._waiting):
            self._some.clear()
            await self._some.wait()
        if self._has_missed:
            self._has_missed = False
            return NoticesMissed()
        return self._waiting.popleft()

    def put(self, notice: Notice) -> None:
        if len(self._waiting) >= MAX_WAITING:
            # To be told to read everything says all that these say.
            self._waiting.clear()
            self._has_missed = True
        self._waiting.append(notice)
        self._some.set()

    def miss(self) -> None:
        """There was a gap, or listening begins."""
        self._has_missed = True
        self._some.set()


class Listener:
    """`send` sends notices by way of the main address, and `begin` is called when somebody subscribes: `run` is to run from
    then on."""

    def __init__(
        self,
        where: str | Address,
        *,
        send: Callable[[Query[None]], Awaitable[None]],
        begin: Callable[[], object],
        application: str = "queue_service listener",
    ) -> None:
        main = Address.of(where)
        self._is_direct = main.listen_url is not None
        self._address = main if main.listen_url is None else Address(main.listen_url)
        self._send = send
        self._begin = begin
        self._application = application
        self._subscribers: dict[str, list[Notices]] = {}
        # What the connection listens to.
        self._heard: set[str] = set()
        # Who is subscribed to what has changed, or the connection has ended.
        self._changed = asyncio.Event()
        self._ended: psycopg.Error | None = None
        self._reading: _Reading | None = None
        # Comes back to us alone, where both addresses lead to one database.
        self._echo = Notice(f"{ECHO}_{secrets.token_hex(8)}", "")
        self._echoed = asyncio.Event()
        self._heard_at = 0.0
        #: Why nothing is heard, where that does not change by itself: a sentence without hosts and users.
        self.why_polling: str | None = None
        #: Whether that is as it should be.
        self.polls_by_design = False

    @property
    def connected(self) -> bool:
        """Whether all that somebody is subscribed to is heard."""
        return bool(self._heard) and self._subscribers.keys() <= self._heard

    def hears(self, channel: str) -> bool:
        """Whether somebody is subscribed to it, and it is listened to."""
        return channel in self._heard

    @contextmanager
    def subscribed(self, *names: str) -> Iterator[Notices]:
        """Notices of these channels, for the length of the block."""
        notices = Notices()
        for name in names:
            self._subscribers.setdefault(name, []).append(notices)
        if self._heard.issuperset(names):
            notices.miss()
        self._changed.set()
        self._begin()
        try:
            yield notices
        finally:
            for name in names:
                self._subscribers[name].remove(notices)
                if not self._subscribers[name]:
                    del self._subscribers[name]
            self._changed.set()

    def rest(self, notices: Notices, seconds: float) -> None:
        """A subscriber can do without what comes for so many seconds. If there is no other, nothing is read meanwhile: to
        read costs many processes more than all else where most notices are not for them."""
        is_alone = all(each is notices for some in self._subscribers.values() for each in some)
        if is_alone and self._reading is not None:
            self._reading.rest(seconds)

    async def run(self, well: Callable[[], object], failed: Callable[[Exception], object]) -> None:
        """Listen while somebody is subscribed, through all outages, until cancelled. What becomes of it is said to `well`
        and `failed`."""
        pauses = Pauses(FIRST_PAUSE, MAX_PAUSE, jitter=random.random)
        while True:
            await self._wanted()
            try:
                if self._address.pooler == "transaction":
                    await self._poll(well)
                async with self._connection() as conn:
                    if conn.is_pooled:
                        await self._poll(well)
                    await self._hear(conn, well, pauses)
            except Misdirected as lost:
                self.why_polling = str(lost)
                failed(lost)
                await asyncio.sleep(MISDIRECTED_PAUSE)
            except DatabaseUnavailable as lost:
                failed(lost)
                # Full jitter: a restarted server must not be met by every listener at once.
                await asyncio.sleep(pauses.next())

    async def _wanted(self) -> None:
        while not self._subscribers:
            self._changed.clear()
            await self._changed.wait()

    async def _poll(self, well: Callable[[], object]) -> None:
        """Hear nothing, for ever: a pooler that passes no notices on will not do so later."""
        self.polls_by_design = not self._is_direct
        if self.polls_by_design:
            self.why_polling = "a transaction pooler passes no notices on, and QUEUE_SERVICE_LISTEN_URL is not set"
            log.info("nothing is heard behind a transaction pooler; polling", why=self.why_polling)
        else:
            self.why_polling = "QUEUE_SERVICE_LISTEN_URL leads to a transaction pooler: set an address past it"
            log.error("nothing is heard behind a transaction pooler; polling", why=self.why_polling)
        well()
        await asyncio.Event().wait()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Session]:
        conn = await connect(self._address, application=self._application)
        self._ended = None
        try:
            with translated():
                yield conn
        finally:
            self._heard.clear()
            conn.pgconn.finish()

    async def _hear(self, conn: Session, well: Callable[[], object], pauses: Pauses) -> None:
        """Until nobody was subscribed for LINGER seconds. Raises an error of psycopg once the connection has ended."""
        conn.add_notify_handler(lambda notify: self._take(Notice(notify.channel, notify.payload)))
        is_new = True
        while True:
            self._changed.clear()
            await self._listen_as_wanted(conn)
            if is_new:
                await self._check_direction(conn)
                self.why_polling, is_new = None, False
                pauses.reset()
                well()
            with self._taking(conn):
                has_changed = await _is_set(self._changed, PING_INTERVAL if self._subscribers else LINGER)
            if self._ended is not None:
                raise self._ended
            if not has_changed:
                if not self._subscribers:
                    return
                await self._ping(conn)
                well()

    async def _listen_as_wanted(self, conn: Session) -> None:
        wanted = set(self._subscribers)
        # Without a subscriber the connection is about to end.
        if not wanted or wanted == self._heard:
            return
        own = {self._echo.channel} if self._is_direct else set()
        # All of them each time: to listen twice costs nothing, and the server's list of sessions shows what each hears.
        listen = [sql.SQL("listen {}").format(sql.Identifier(name)) for name in sorted(own | wanted)]
        unlisten = [sql.SQL("unlisten {}").format(sql.Identifier(name)) for name in sorted(self._heard - wanted)]
        await _execute(conn, sql.SQL("; ").join(listen + unlisten))
        new, self._heard = wanted - self._heard, wanted
        self._heard_at = time.monotonic()
        for notices in {id(each): each for name in new for each in self._subscribers.get(name, ())}.values():
            notices.miss()

    async def _ping(self, conn: Session) -> None:
        if time.monotonic() - self._heard_at < PING_INTERVAL:
            return
        await _execute(conn, sql.SQL("select 1"))
        await self._check_direction(conn)

    async def _check_direction(self, conn: Session) -> None:
        """Raise Misdirected where a notice that is sent by way of the main address is not heard here."""
        if not self._is_direct:
            return
        self._echoed.clear()
        try:
            async with asyncio.timeout(PING_DEADLINE):
                await self._send(notify([self._echo], alone=True))
        except (TimeoutError, *NOT_EXECUTED):
            # There is no telling.
            return
        with self._taking(conn):
            if not await _is_set(self._echoed, PING_DEADLINE):
                raise Misdirected(
                    "QUEUE_SERVICE_LISTEN_URL leads to another database: what is sent by way of the database URL is not "
                    "heard there. Let both lead to the same database of the same server"
                )

    # What comes

    @contextmanager
    def _taking(self, conn: Session) -> Iterator[None]:
        """Take what comes while no statement is executed. Without a generator of psycopg's: that would cost each of many
        idle processes three times as much for each notice."""
        self._reading = _Reading(conn.pgconn.socket, functools.partial(self._read, conn))
        try:
            # What came together with the answer to a statement.
            self._read(conn)
            yield
        finally:
            self._stop_reading()

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.end()
            self._reading = None

    def _read(self, conn: Session) -> None:
        try:
            conn.pgconn.consume_input()
            while (notice := conn.pgconn.notifies()) is not None:
                self._take(Notice(notice.relname.decode(), notice.extra.decode(errors="replace")))
        except psycopg.Error as lost:
            # libpq has closed its socket, and the next one of this process gets the same number.
            self._stop_reading()
            self._ended = lost
            self._changed.set()
            self._echoed.set()

    def _take(self, notice: Notice) -> None:
        self._heard_at = time.monotonic()
        if notice == self._echo:
            self._echoed.set()
        for notices in self._subscribers.get(notice.channel, ()):
            notices.put(notice)


class _Reading:
    """Calls `read` when something has come on this socket, or once it has rested."""

    def __init__(self, line: int, read: Callable[[], None]) -> None:
        self._line = line
        self._read = read
        self._loop = asyncio.get_running_loop()
        self._resting: asyncio.TimerHandle | None = None
        self._begin()

    def rest(self, seconds: float) -> None:
        self.end()
        self._resting = self._loop.call_later(seconds, self._begin)

    def end(self) -> None:
        self._loop.remove_reader(self._line)
        if self._resting is not None:
            self._resting.cancel()

    def _begin(self) -> None:
        self._loop.add_reader(self._line, self._read)


async def _execute(conn: Session, statement: sql.Composed | sql.SQL) -> None:
    try:
        async with asyncio.timeout(PING_DEADLINE):
            await conn.execute(statement, prepare=False)
    except TimeoutError:
        raise psycopg.OperationalError("the listening connection stopped answering") from None


async def _is_set(event: asyncio.Event, seconds: float) -> bool:
    """Whether it is set within so many seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
