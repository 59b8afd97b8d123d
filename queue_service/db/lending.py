"""Connections for what handlers do in transactions of their own.

They are not the App's: what keeps a worker going, and what a handler enqueues beside its transaction, would wait for the
handlers that hold them. They are opened when the first handler asks, with the settings of the database and the role, since
ours for the planner are for our statements; and looked at before they are lent, because nobody repeats what a handler did.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
import psycopg_pool
from psycopg.pq import TransactionStatus

from queue_service.db.execute import DEADLINE, cancellable
from queue_service.db.pool import none_free
from queue_service.db.session import options
from queue_service.errors import ConfigError

# A handler that is stuck, or whose machine is gone, keeps neither its locks nor what vacuum would remove: the server rolls
# back a transaction that is idle for 60 s, and looks after 10 s whether anybody is there.
_SESSION = """
select set_config('idle_in_transaction_session_timeout', '60s', false),
       set_config('tcp_keepalives_idle', '10', false),
       set_config('tcp_keepalives_interval', '5', false),
       set_config('tcp_keepalives_count', '3', false),
       set_config('default_transaction_isolation', 'read committed', false),
       set_config('synchronous_commit',
                  case current_setting('synchronous_commit') when 'off' then 'on'
                       else current_setting('synchronous_commit') end, false)
"""


class CancellablePool(psycopg_pool.AsyncConnectionPool[psycopg.AsyncConnection[Any]]):
    """psycopg's pool, for callers that are cancelled at any moment.

    A `putconn` waits for the lock of the client that is to have the connection. One that is cancelled meanwhile loses the
    connection, and the client waits for ever. So `putconn` goes on here, whatever happens to its caller.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # How many wait for a connection at the moment.
        self.clients = 0
        self._returning: set[asyncio.Task[None]] = set()

    async def getconn(self, timeout: float | None = None) -> psycopg.AsyncConnection[Any]:
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

    async def putconn(self, conn: psycopg.AsyncConnection[Any]) -> None:
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


class Lender:
    """At most `size` connections for async handlers, all on this `loop` (None: there are no such handlers), and as many for
    those in threads. Raises DatabaseUnavailable where none becomes free."""

    def __init__(self, conninfo: str, *, size: int, loop: asyncio.AbstractEventLoop | None = None) -> None:
        shared: dict[str, Any] = {
            "conninfo": options(conninfo, "queue_service handler"), "min_size": 0, "max_size": size, "open": False,
            "kwargs": {"autocommit": True}, "timeout": DEADLINE, "reconnect_timeout": DEADLINE, "name": "handlers",
        }  # fmt: skip
        pool, blocking = CancellablePool, psycopg_pool.ConnectionPool
        self._pool = pool(configure=_configure, check=pool.check_connection, **shared)
        self._blocking = blocking(configure=_configure_blocking, check=blocking.check_connection, **shared)
        self.loop = loop

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        if asyncio.get_running_loop() is not self.loop:
            raise ConfigError("This is not the worker's event loop. Use `with` here, or give a connection of your own.")
        await self._pool.open()
        try:
            conn = await self._pool.getconn()
        except psycopg_pool.PoolTimeout:
            raise none_free() from None
        try:
            yield conn
        finally:
            await self._pool.putconn(conn)

    @contextmanager
    def blocking(self) -> Iterator[psycopg.Connection[Any]]:
        self._blocking.open()
        try:
            conn = self._blocking.getconn()
        except psycopg_pool.PoolTimeout:
            raise none_free() from None
        try:
            yield conn
        finally:
            self._blocking.putconn(conn)

    async def close(self) -> None:
        await self._pool.close()
        await asyncio.to_thread(self._blocking.close)


async def _configure(conn: psycopg.AsyncConnection[Any]) -> None:
    await conn.execute(_SESSION)


def _configure_blocking(conn: psycopg.Connection[Any]) -> None:
    conn.execute(_SESSION)
