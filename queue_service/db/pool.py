"""Connections of ours: how one is opened, a pool of them, and a single one that is reopened when it breaks.

All are in autocommit mode, since our operations are single statements; the session settings below are what every
statement of ours relies on.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, TypeVar

import psycopg
import psycopg_pool
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus

from queue_service.db.execute import DEADLINE, cancellable, fetch, may_repeat, translated
from queue_service.db.query import Query
from queue_service.errors import DatabaseUnavailable

T = TypeVar("T")
Connection = psycopg.AsyncConnection[Any]

# A half-open connection is noticed within about 25 s idle, 15 s with data in flight.
_TCP = {
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}

# Settings of the server, the database or the role must not change what a statement means, so each session says them.
# enable_*: every statement of ours is shaped for an ordered walk along one index, and the statistics of a queue's tables
# are always out of date, so the planner would now and then talk itself into reading the whole table first.
# synchronous_commit: durability is promised, so `off` is not accepted; every other setting is left alone.
SESSION = """
select set_config('statement_timeout', '30s', false),
       set_config('lock_timeout', '10s', false),
       set_config('idle_in_transaction_session_timeout', '60s', false),
       set_config('default_transaction_isolation', 'read committed', false),
       set_config('synchronous_commit',
                  case current_setting('synchronous_commit') when 'off' then 'on'
                       else current_setting('synchronous_commit') end, false),
       set_config('enable_seqscan', 'off', false),
       set_config('enable_bitmapscan', 'off', false),
       set_config('enable_mergejoin', 'off', false),
       set_config('jit', 'off', false),
       set_config('plan_cache_mode', 'force_generic_plan', false),
       set_config('timezone', 'UTC', false)
"""

# How often a statement that may be repeated is sent in all, before the caller hears that it failed.
_TRIES = 3


async def connect(
    conninfo: str,
    *,
    application: str = "queue_service",
    lock_timeout: timedelta | None = None,
    statement_timeout: timedelta | None = None,
) -> Connection:
    """A fresh connection with our session settings, but for what is given. Raises DatabaseUnavailable."""
    with translated():
        conn = await psycopg.AsyncConnection.connect(options(conninfo, application), autocommit=True)
        try:
            # `connect_timeout` ends with the handshake; a server that stops right after it would be waited for for ever.
            async with asyncio.timeout(DEADLINE):
                await _configure(conn)
                if lock_timeout is not None:
                    await _set(conn, "lock_timeout", lock_timeout)
                if statement_timeout is not None:
                    await _set(conn, "statement_timeout", statement_timeout)
        except TimeoutError:
            await conn.close()
            raise DatabaseUnavailable(f"The database did not answer within {DEADLINE:g} s.") from None
        except BaseException:
            await conn.close()
            raise
        return conn


def options(conninfo: str, application: str = "queue_service") -> str:
    return make_conninfo(conninfo, **_TCP, application_name=application)


async def _configure(conn: Connection) -> None:
    await conn.execute(SESSION)


async def _set(conn: Connection, setting: str, duration: timedelta) -> None:
    milliseconds = f"{duration / timedelta(milliseconds=1):.0f}"
    await conn.execute("select set_config(%s, %s, false)", [setting, milliseconds])


def none_free() -> DatabaseUnavailable:
    return DatabaseUnavailable(
        f"No connection became free within {DEADLINE:g} s. The server may be down, or QUEUE_SERVICE_POOL_SIZE too small "
        "for what this process does at once."
    )


class CancellablePool(psycopg_pool.AsyncConnectionPool[Connection]):
    """psycopg's pool, for callers that are cancelled at any moment.

    A `putconn` waits for the lock of the client that is to have the connection. One that is cancelled meanwhile loses the
    connection, and the client waits for ever. So `putconn` goes on here, whatever happens to its caller.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # How many wait for a connection at the moment.
        self.clients = 0
        self._returning: set[asyncio.Task[None]] = set()

    async def getconn(self, timeout: float | None = None) -> Connection:
        conn = None
        self.clients += 1
        try:
            with cancellable():
                conn = await super().getconn(timeout)
        except asyncio.CancelledError:
            if conn is not None:
                await self.putconn(conn)
            raise
        finally:
            self.clients -= 1
        return conn

    async def putconn(self, conn: Connection) -> None:
        if not self.clients and conn.info.transaction_status is TransactionStatus.IDLE:
            # Then nothing is waited for, and no task of its own is needed: it would cost 25 us.
            await super().putconn(conn)
            return
        returning = asyncio.create_task(super().putconn(conn), name="return of a connection")
        self._returning.add(returning)
        returning.add_done_callback(self._returning.discard)
        await asyncio.shield(returning)

    async def close(self, timeout: float = 5.0) -> None:
        if self._returning:
            await asyncio.wait(self._returning, timeout=timeout)
        await super().close(timeout)


class Pool:
    """A bounded pool. `fetch` runs one query on any connection; `connection` lends one out."""

    def __init__(self, conninfo: str, *, size: int, application: str = "queue_service") -> None:
        self._pool = CancellablePool(
            options(conninfo, application),
            min_size=1,
            max_size=size,
            open=False,
            configure=self._configure,
            kwargs={"autocommit": True},
            timeout=DEADLINE,
            reconnect_timeout=DEADLINE,
            name=application,
        )
        # The connection that was given back last waits here for whoever comes next: 40 us less than by way of the pool.
        self._parked: Connection | None = None
        self._timeout: timedelta | None = None

    async def open(self) -> None:
        """Begin to connect. A wrong address is not noticed here, but at the first use."""
        await self._pool.open()

    async def close(self) -> None:
        parked, self._parked = self._parked, None
        if parked is not None:
            await self._pool.putconn(parked)
        await self._pool.close()

    async def hurry(self, timeout: timedelta) -> None:
        """Have the server give up on a statement after so long: on one connection that is open, and on all that are opened
        later."""
        self._timeout = timeout
        async with self.connection() as conn:
            await self._configure(conn)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        conn = await self._take()
        try:
            yield conn
        finally:
            await self._give(conn)

    async def fetch(self, query: Query[T], *, deadline: float = DEADLINE) -> T:
        conn = await self._take()
        try:
            return await _persistently(conn, query, deadline)
        finally:
            await self._give(conn)

    async def _configure(self, conn: Connection) -> None:
        await _configure(conn)
        if self._timeout is not None:
            await _set(conn, "statement_timeout", self._timeout)

    async def _take(self) -> Connection:
        conn, self._parked = self._parked, None
        if conn is not None:
            return conn
        try:
            return await self._pool.getconn()
        except psycopg_pool.PoolTimeout:
            raise none_free() from None
        except psycopg_pool.PoolClosed:
            raise DatabaseUnavailable("The connections of this App were closed.") from None

    async def _give(self, conn: Connection) -> None:
        idle = not conn.closed and conn.info.transaction_status is TransactionStatus.IDLE
        if idle and self._parked is None and not self._pool.clients and not self._pool.closed:
            self._parked = conn
        else:
            await self._pool.putconn(conn)


class OwnConnection:
    """One connection of its own for one coroutine: never shared, so it never waits in a queue behind anyone's work.

    A broken one is replaced at the next `fetch`; the failed call itself raises DatabaseUnavailable, because only the
    caller knows whether repeating it is right.
    """

    def __init__(
        self,
        conninfo: str,
        *,
        application: str,
        lock_timeout: timedelta | None = None,
        statement_timeout: timedelta | None = None,
    ) -> None:
        self._connect = functools.partial(
            connect,
            conninfo,
            application=application,
            lock_timeout=lock_timeout,
            statement_timeout=statement_timeout,
        )
        self._conn: Connection | None = None

    async def fetch(self, query: Query[T], *, deadline: float = DEADLINE) -> T:
        if self._conn is None or self._conn.closed:
            self._conn = await self._connect()
        try:
            return await _persistently(self._conn, query, deadline)
        except DatabaseUnavailable:
            await self.close()
            raise

    async def close(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            await conn.close()


async def _persistently(conn: Connection, query: Query[T], deadline: float) -> T:
    for attempt in range(_TRIES):
        try:
            return await fetch(conn, query, deadline=deadline)
        except psycopg.Error as lost:
            if not may_repeat(lost):
                raise
            if attempt == _TRIES - 1:
                raise DatabaseUnavailable(f"The database kept refusing a statement: {lost}") from lost
            await asyncio.sleep(0.01 * (attempt + 1))
    raise AssertionError("unreachable")
