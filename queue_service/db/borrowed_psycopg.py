"""A psycopg connection that belongs to the caller.

What would not work on it is refused before anything is sent. Nothing of it is used but its line to the server: neither its
cursors, nor its rows, nor its adapters. The caller's own timeouts apply. In pipeline mode, what the caller has sent before
is brought to its end first, so that its errors are the caller's, and so is what we send.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from typing import Any, Literal, TypeVar

import psycopg
from psycopg import errors as pg
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.rows import tuple_row

from queue_service.db.adapters import AsyncCursor, Cursor
from queue_service.db.execute import copying
from queue_service.db.hangup import shut
from queue_service.db.meaning import meaning
from queue_service.db.query import Query, Rows
from queue_service.db.rows import salvaged
from queue_service.errors import (
    ConfigError,
    DatabaseRefused,
    DatabaseUnavailable,
    Deadlock,
    QueueServiceError,
    TransactionConflict,
)

T = TypeVar("T")
AnyConnection = psycopg.Connection[Any] | psycopg.AsyncConnection[Any]

# Seconds for which another use of the connection is waited for. The block of a COPY that the caller is in does not end
# before we return.
BUSY_PATIENCE = 30.0
# How long whoever uses a connection that was hung up on may take to notice.
HANG_UP_SECONDS = 1.0


class Psycopg:
    is_async: Literal[False] = False

    def __init__(self, conn: psycopg.Connection[Any]) -> None:
        self._conn = conn

    def fetch(self, query: Query[T]) -> T:
        with self._alone() as pipeline, told(self._conn):
            check_usable(self._conn, writes=query.writes)
            cursor = Cursor(self._conn, row_factory=tuple_row)
            cursor.execute(query.text.encode(), query.params, binary=True)
            if pipeline is not None:
                pipeline.sync()
            try:
                rows: Rows = cursor.fetchall() if cursor.description else []
            except Exception:  # noqa: BLE001 - each type has its own errors
                rows = salvaged(cursor)
        return query.decode(rows)

    def copy(self, statement: str, data: str) -> None:
        with self._alone(), told(self._conn), copying(self._conn.pgconn):
            check_usable(self._conn, writes=True)
            with Cursor(self._conn) as cursor, cursor.copy(statement.encode()) as copy:
                copy.write(data)

    def begin(self) -> AbstractContextManager[Any]:
        check_usable(self._conn, writes=True)
        refuse_begun(has_begun(self._conn))
        return self._conn.transaction()

    def in_transaction(self) -> bool:
        return not self._conn.autocommit or has_begun(self._conn)

    def can_copy(self) -> bool:
        return not is_pipelined(self._conn)

    @contextmanager
    def _alone(self) -> Iterator[psycopg.Pipeline | None]:
        if self._conn.lock.locked():
            if not self._conn.lock.acquire(timeout=BUSY_PATIENCE):
                raise _busy()
            self._conn.lock.release()
        if not is_pipelined(self._conn):
            yield None
            return
        with self._conn.pipeline() as pipeline:
            yield pipeline


class AsyncPsycopg:
    is_async: Literal[True] = True

    def __init__(self, conn: psycopg.AsyncConnection[Any]) -> None:
        self._conn = conn

    async def fetch(self, query: Query[T]) -> T:
        return await (self._hung_up_if_cancelled(self._fetch(query)) if query.writes else self._fetch(query))

    async def copy(self, statement: str, data: str) -> None:
        await self._hung_up_if_cancelled(self._copy(statement, data))

    async def _hung_up_if_cancelled(self, write: Coroutine[Any, Any, T]) -> T:
        """The driver has a statement cancelled on the server where its caller is cancelled. One that is a transaction by
        itself may be committing, so its connection is closed instead. See `db/execute.py`."""
        if await self.in_transaction():
            return await write
        writing = asyncio.ensure_future(write)
        try:
            return await asyncio.shield(writing)
        except asyncio.CancelledError:
            if not writing.done():
                with suppress(OSError, psycopg.Error):
                    shut(self._conn.pgconn.socket)
                await asyncio.wait([writing], timeout=HANG_UP_SECONDS)
            if writing.done() and not writing.cancelled():
                writing.exception()
            raise

    async def _fetch(self, query: Query[T]) -> T:
        async with self._alone() as pipeline:
            with told(self._conn):
                check_usable(self._conn, writes=query.writes)
                cursor = AsyncCursor(self._conn, row_factory=tuple_row)
                await cursor.execute(query.text.encode(), query.params, binary=True)
                if pipeline is not None:
                    await pipeline.sync()
                try:
                    rows: Rows = await cursor.fetchall() if cursor.description else []
                except Exception:  # noqa: BLE001 - each type has its own errors
                    rows = salvaged(cursor)
        return query.decode(rows)

    async def _copy(self, statement: str, data: str) -> None:
        async with self._alone():
            with told(self._conn), copying(self._conn.pgconn):
                check_usable(self._conn, writes=True)
                async with AsyncCursor(self._conn) as cursor, cursor.copy(statement.encode()) as copy:
                    await copy.write(data)

    def begin(self) -> AbstractAsyncContextManager[Any]:
        check_usable(self._conn, writes=True)
        refuse_begun(has_begun(self._conn))
        return self._conn.transaction()

    async def in_transaction(self) -> bool:
        return not self._conn.autocommit or has_begun(self._conn)

    async def driver(self) -> psycopg.AsyncConnection[Any]:
        return self._conn

    async def can_copy(self) -> bool:
        return not is_pipelined(self._conn)

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[psycopg.AsyncPipeline | None]:
        if self._conn.lock.locked():
            try:
                async with asyncio.timeout(BUSY_PATIENCE), self._conn.lock:
                    pass
            except TimeoutError:
                raise _busy() from None
        if not is_pipelined(self._conn):
            yield None
            return
        async with self._conn.pipeline() as pipeline:
            yield pipeline


def is_pipelined(conn: AnyConnection) -> bool:
    return conn.pgconn.pipeline_status != PipelineStatus.OFF


def has_begun(conn: AnyConnection) -> bool:
    return conn.pgconn.transaction_status not in {TransactionStatus.IDLE, TransactionStatus.UNKNOWN}


def refuse_begun(begun: bool) -> None:
    """ConfigError for a connection that is to begin a transaction, and has."""
    if begun:
        raise ConfigError(
            "This connection is in the middle of a transaction, and the block is to be one of its own. Commit or roll back "
            "first, or give another connection."
        )


def check_usable(conn: AnyConnection, *, writes: bool) -> None:
    """Raise ConfigError where nothing could be sent, or would not mean what it says; DatabaseUnavailable where the server
    is gone. This asks nobody: the server reports these settings by itself."""
    if conn.broken:
        raise DatabaseUnavailable(
            "This connection has lost the server, and its transaction with it. Open another one, and begin again."
        )
    if conn.closed:
        raise ConfigError("This connection is closed. Give one that is open.")
    if conn.pgconn.transaction_status == TransactionStatus.INERROR:
        raise ConfigError(
            "A statement of this transaction has failed before, and Postgres takes nothing more of it. Roll it back, or "
            "back to a savepoint, and begin again."
        )
    _check_encodings(conn)
    if writes:
        _check_takes_writes(conn)


def _check_encodings(conn: AnyConnection) -> None:
    client, server = conn.pgconn.parameter_status(b"client_encoding"), conn.pgconn.parameter_status(b"server_encoding")
    if client not in {b"UTF8", None}:
        raise ConfigError(
            f"The client_encoding of this connection is {client.decode()}, which cannot carry every text of a run. Connect "
            "with client_encoding=utf8, or send `set client_encoding to 'UTF8'` on it."
        )
    if server not in {b"UTF8", None}:
        raise ConfigError(
            f"The encoding of this database is {server.decode()}, which cannot hold every text of a run. Use a database "
            "whose encoding is UTF8."
        )


def _check_takes_writes(conn: AnyConnection) -> None:
    if conn.read_only:
        raise ConfigError("This connection is read only, by its own `read_only`. Give one that may write.")
    # psycopg has no other word for it.
    refuse_two_phases(getattr(conn, "_tpc", None) is not None)


def refuse_two_phases(are_two: bool) -> None:
    """ConfigError for a transaction of two phases: to prepare it would fail, long after this."""
    if are_two:
        raise ConfigError(
            "This transaction is one of two phases, and Postgres prepares none that has sent notices, as ours do. Use a "
            "connection of its own for the queue, with an ordinary transaction."
        )


@contextmanager
def told(conn: AnyConnection | None) -> Iterator[None]:
    """As `execute.translated`, of a connection of the caller's: the driver's error, also where the caller's library has put
    it into one of its own, as ours, from what was raised."""
    try:
        yield
    except QueueServiceError:
        raise
    except Exception as raised:
        error = of_driver(raised)
        ours = None if error is None else _meaning(error, conn)
        if ours is None:
            raise
        raise ours from raised


def of_driver(raised: Exception) -> psycopg.Error | None:
    """The error of the driver in one of SQLAlchemy's, or one of Django's."""
    for error in (raised, getattr(raised, "orig", None), raised.__cause__):
        if isinstance(error, psycopg.Error):
            return error
    return None


def _meaning(error: psycopg.Error, conn: AnyConnection | None) -> QueueServiceError | None:
    if isinstance(error, pg.DeadlockDetected):
        return Deadlock()
    if isinstance(error, pg.SerializationFailure):
        return TransactionConflict()
    if isinstance(error, pg.ReadOnlySqlTransaction):
        return DatabaseRefused(
            "This transaction takes no writes. Its connection, session or role says so, or its server is a standby: give a "
            "connection that may write."
        )
    if isinstance(error, psycopg.OperationalError) and error.sqlstate is None and conn is not None and not conn.closed:
        # libpq has refused to send it.
        return _busy()
    return meaning(error)


def _busy() -> ConfigError:
    return ConfigError(
        "This connection is in use: the block of a COPY or a stream() on it has not ended, or another thread or task uses "
        "it. Nothing was sent. Call this after that, or give another connection."
    )
