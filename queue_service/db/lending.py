"""Connections for what handlers do in transactions of their own.

They are not the App's: what keeps a worker going, and what a handler enqueues beside its transaction, would wait for the
handlers that hold them. None is opened before a handler asks, and one that is not needed for a while is closed. Their
planner, search path and time zone are those of the role, since the handler's statements are.

To wait for one of ours is no failure of a run: it waits for as long as it is its handler's, for others that were first and
for the database. A connection is lent with its transaction begun, so that no handler meets one that is gone, or takes no
writes: nobody repeats what a handler did.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import psycopg
from psycopg import pq

from queue_service.backoff import Pauses
from queue_service.db.hosts import each_host
from queue_service.db.lent import LentAsyncConnection, LentConnection, Unfit
from queue_service.db.lines import Borrower, Lines, Ticket
from queue_service.db.meaning import meaning
from queue_service.db.session import LIFE, Address
from queue_service.errors import ClaimLost, ConfigError, DatabaseUnavailable
from queue_service.logs import get_logger

log = get_logger(__name__)

C = TypeVar("C", LentAsyncConnection, LentConnection)

# Between two tries to connect: at most this, and half of it on average.
FIRST_PAUSE, LAST_PAUSE = 0.1, 1.0
# What nobody has used for so many seconds is closed.
IDLE = 30.0
# A run that waits for longer is logged, once for all that wait.
LONG = 10.0


class _Kept(NamedTuple):
    """A connection that nobody has: (monotonic) when it is too old, and since when it is here."""

    pgconn: pq.abc.PGconn
    ends_at: float
    since: float


class Lender:
    """Lends to as many runs of a queue at once as `limit_of` says, whether their handlers are on this `loop` (None: there
    are none) or in threads. The database may say nothing about a statement for so long. `on_wait` is as in Lines."""

    def __init__(
        self,
        where: str | Address,
        *,
        limit_of: Callable[[str], int],
        statement_timeout: timedelta,
        loop: asyncio.AbstractEventLoop | None = None,
        on_wait: Callable[[Borrower, bool], None] = lambda _run, _waits: None,
    ) -> None:
        self.loop = loop
        self._address = Address.of(where)
        self._silence = statement_timeout.total_seconds()
        self._lines = Lines(limit_of, on_wait=on_wait)
        self._changing = threading.Lock()
        self._idle: deque[_Kept] = deque()
        self._closing_idle: threading.Timer | None = None
        # What handlers in threads have.
        self._lent: dict[Ticket, LentConnection] = {}
        self._is_waiting_told = False
        self._host = 0
        self._is_closed = False

    @asynccontextmanager
    async def transaction(self, run: Borrower) -> AsyncIterator[LentAsyncConnection]:
        """For the length of the block, a connection in a transaction, which is committed at its end, or rolled back.

        Raises ClaimLost once the run is not its handler's any more, ConfigError on another event loop, and where it cannot
        commit what the database says, or DatabaseUnavailable."""
        if asyncio.get_running_loop() is not self.loop:
            raise ConfigError("This is not the worker's event loop. Use `with` here, or give a connection of your own.")
        ticket = self._lines.ask(run)
        try:
            conn = await self._begun(ticket)
            try:
                self._lines.hold(ticket)
                yield conn
                await conn.end(commits=True)
            except BaseException as error:
                await conn.end(commits=False)
                if not _was_asked_for(error):
                    raise
            finally:
                self._keep(conn, is_usable=await conn.reset())
        finally:
            self._lines.leave(ticket)

    @contextmanager
    def blocking_transaction(self, run: Borrower) -> Iterator[LentConnection]:
        """As `transaction`, in a thread. That of a run which is stopped is cut: a thread that was given up must keep
        neither it nor what it has locked."""
        ticket = self._lines.ask(run)
        try:
            conn = self._begun_blocking(ticket)
            try:
                self._lent[ticket] = conn
                self._lines.hold(ticket)
                # `stop` may have come just before.
                _check_is_ours(run)
                yield conn
                conn.end(commits=True)
            except BaseException as error:
                conn.end(commits=False)
                if not _was_asked_for(error):
                    raise
            finally:
                self._lent.pop(ticket, None)
                self._keep(conn, is_usable=conn.reset())
        finally:
            self._lines.leave(ticket)

    def stop(self, claim: tuple[int, int]) -> None:
        """The run of this claim was stopped, and is marked so: it waits no longer, and a thread that has a connection loses
        it, unless it may be committing. May be called from any thread."""
        for ticket in self._lines.stop(claim):
            conn = self._lent.get(ticket)
            if conn is not None and conn.cut():
                self._lines.leave(ticket)

    def close(self) -> None:
        """Close what nobody has; the others are closed as they come back."""
        self._is_closed = True
        if self._closing_idle is not None:
            self._closing_idle.cancel()
        self._close_idle(0.0)

    # Waiting

    async def _begun(self, ticket: Ticket) -> LentAsyncConnection:
        if not ticket.granted.done():
            granted = asyncio.wrap_future(ticket.granted)
            done, _ = await asyncio.wait([granted], timeout=LONG)
            if not done:
                self._tell_of_waiting(ticket, None)
                await granted
        pauses = self._granted(ticket)
        while True:
            kept, conn = self._taken(), None
            try:
                if kept is None:
                    conn = await LentAsyncConnection.connect(self._conninfo())
                else:
                    conn = LentAsyncConnection(kept.pgconn)
                await conn.begin(self._pid_of(conn))
                return self._ready(conn, kept)
            except BaseException as lost:  # noqa: BLE001 - raised again if it is not that the database is not there
                self._failed(ticket, conn, lost)
            if kept is None:
                await asyncio.sleep(pauses.next())

    def _begun_blocking(self, ticket: Ticket) -> LentConnection:
        try:
            ticket.granted.result(timeout=LONG)
        except TimeoutError:
            self._tell_of_waiting(ticket, None)
            ticket.granted.result()
        pauses = self._granted(ticket)
        while True:
            kept, conn = self._taken(), None
            try:
                conn = LentConnection.connect(self._conninfo()) if kept is None else LentConnection(kept.pgconn)
                conn.begin(self._pid_of(conn))
                return self._ready(conn, kept)
            except BaseException as lost:  # noqa: BLE001 - as above
                self._failed(ticket, conn, lost)
            if kept is None:
                ticket.stopped.wait(pauses.next())

    def _granted(self, ticket: Ticket) -> Pauses:
        """Between tries to connect."""
        if not ticket.granted.result():
            raise ClaimLost(*ticket.claim)
        return Pauses(FIRST_PAUSE, LAST_PAUSE, jitter=random.random)

    def _failed(self, ticket: Ticket, conn: LentAsyncConnection | LentConnection | None, lost: BaseException) -> None:
        """Raises it, unless waiting may help."""
        self._host += 1
        if conn is not None:
            conn.hang_up()
        why = (meaning(lost) or lost) if isinstance(lost, psycopg.Error) else lost
        if not isinstance(why, (DatabaseUnavailable, Unfit)):
            raise why from (None if why is lost else lost)
        if isinstance(lost, (DatabaseUnavailable, Unfit)):
            # A server that says nothing, or takes no writes: the others that are kept will be no better.
            self._close_idle(0.0)
        _check_is_ours(ticket.run)
        if self._is_closed:
            raise DatabaseUnavailable("The connections of this worker were closed.") from None
        if time.monotonic() - ticket.since > LONG:
            self._tell_of_waiting(ticket, why)

    def _tell_of_waiting(self, ticket: Ticket, why: Exception | None) -> None:
        with self._changing:
            was_told, self._is_waiting_told = self._is_waiting_told, True
        if not was_told:
            lent, waiting = self._lines.count()
            log.warning(
                "runs wait for a connection, and their time stands still meanwhile",
                run_id=ticket.run.id, task=ticket.run.task, queue=ticket.run.queue, lent=lent, waiting=waiting,
                why="all are lent" if why is None else str(why),
            )  # fmt: skip

    # Connections

    def _conninfo(self) -> str:
        """The host that was good the last time, or the one after those that were not."""
        return each_host(self._address.conninfo, "queue_service handler", first=self._host)[0]

    def _pid_of(self, conn: LentAsyncConnection | LentConnection) -> int | None:
        return {"auto": conn.info.backend_pid, "transaction": 0}.get(self._address.pooler)

    def _taken(self) -> _Kept | None:
        with self._changing:
            return self._idle.pop() if self._idle else None

    def _ready(self, conn: C, kept: _Kept | None) -> C:
        conn.silence = self._silence
        conn.ends_at = time.monotonic() + LIFE * (1 - 0.2 * random.random()) if kept is None else kept.ends_at  # noqa: S311
        if self._is_waiting_told and not self._lines.count()[1]:
            self._is_waiting_told = False
            log.info("runs get connections again")
        return conn

    def _keep(self, conn: LentAsyncConnection | LentConnection, *, is_usable: bool) -> None:
        now = time.monotonic()
        if not is_usable or now > conn.ends_at or self._is_closed:
            conn.hang_up()
            return
        with self._changing:
            self._idle.append(_Kept(conn.stripped(), conn.ends_at, now))
            self._arm()

    def _arm(self) -> None:
        if self._closing_idle is None and self._idle:
            self._closing_idle = threading.Timer(IDLE, self._close_old)
            self._closing_idle.daemon = True
            self._closing_idle.start()

    def _close_old(self) -> None:
        self._closing_idle = None
        self._close_idle(IDLE * 0.9)

    def _close_idle(self, age: float) -> None:
        """Close what nobody has used for so many seconds."""
        with self._changing:
            while self._idle and self._idle[0].since <= time.monotonic() - age:
                self._idle.popleft().pgconn.finish()
            self._arm()


def _was_asked_for(error: BaseException) -> bool:
    """Whether this is how psycopg lets a block roll back and go on behind it."""
    return isinstance(error, psycopg.Rollback) and error.transaction is None


def _check_is_ours(run: Borrower) -> None:
    if run.cancelled:
        raise ClaimLost(run.id, run.attempt) from None
