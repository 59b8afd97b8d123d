"""The two executors of a `Query`, and the one place where driver errors become ours.

Every call has a deadline on this side as well as the server's `statement_timeout`: a peer that stopped answering
(black hole, stopped process) would otherwise hold its caller until TCP gives up. To give up is to hang up: the server goes
on with what it was sent, and a repeat waits behind its locks. Only what writes nothing is cancelled there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg import errors as pg
from psycopg.abc import PQGen
from psycopg.pq import ConnStatus, TransactionStatus
from psycopg.pq.abc import PGconn
from psycopg.rows import tuple_row
from psycopg.waiting import wait_async

from queue_service.db.hangup import HangUp, cancel_there
from queue_service.db.meaning import meaning
from queue_service.db.query import Query, Rows
from queue_service.db.rows import salvaged
from queue_service.errors import DatabaseRefused, DatabaseUnavailable, SchemaMismatch

T = TypeVar("T")

DEADLINE = 30.0
# How often a statement that may be repeated is sent in all, before the caller hears that it failed.
_TRIES = 3
# How often a wait looks whether it was interrupted, in seconds; psycopg's own number.
WAIT_INTERVAL = 0.1

# What the database raises when it has answered, and said no: another statement may go through.
REFUSED = (DatabaseRefused, psycopg.Error)
# All that comes of a statement that was not executed. While a backup is restored a table may be missing, too.
NOT_EXECUTED = (DatabaseUnavailable, SchemaMismatch, *REFUSED)


@contextmanager
def cancellable() -> Iterator[None]:
    """Makes sure that a cancellation that came meanwhile is raised. `asyncio.wait_for`, which psycopg and its pool use,
    drops one that comes at the same moment as its result (before Python 3.12, python/cpython#86296), and whoever
    cancelled would wait for ever."""
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    yield
    if task and task.cancelling() > before:
        raise asyncio.CancelledError


class Connection(psycopg.AsyncConnection[Any]):
    """A connection of ours. Where whoever waits for a statement is cancelled, psycopg has it cancelled on the server. That
    ends the wait of a commit for its synchronous standby, and the commit stands on one server alone: the next call would
    find what was stored there, and acknowledge it. So the connection is closed instead, and the server left to itself, but
    for a statement that writes nothing."""

    only_reads = False

    async def wait(self, gen: PQGen[T], interval: float = WAIT_INTERVAL, timeout: float | None = None) -> T:
        # psycopg 3.2 has no `timeout`, and gives none.
        bounds: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        try:
            with cancellable():
                return await wait_async(gen, self.pgconn.socket, interval=interval, **bounds)
        except (asyncio.CancelledError, KeyboardInterrupt):
            if self.pgconn.transaction_status is not TransactionStatus.IDLE:
                if self.only_reads:
                    cancel_there(self.pgconn)
                self.pgconn.finish()
            raise


async def fetch(conn: psycopg.AsyncConnection[Any], query: Query[T], *, deadline: float = DEADLINE) -> T:
    """Run the query and decode its rows. On DatabaseUnavailable from a passed deadline the connection is closed. Whether a
    statement that writes was executed is then not known: it may still be, and a repeat waits behind its locks."""
    line = HangUp(conn, deadline, may_cancel=not query.writes)
    with translated(), cancellable():
        try:
            if isinstance(conn, Connection):
                conn.only_reads = not query.writes
            # Not conn.cursor(): a caller's connection may make cursors and rows of other kinds.
            cursor = psycopg.AsyncCursor(conn, row_factory=tuple_row)
            await cursor.execute(query.text.encode(), query.params, binary=True)
            try:
                rows: Rows = await cursor.fetchall() if cursor.description else []
            except Exception:  # noqa: BLE001 - each type has its own errors
                rows = salvaged(cursor)
        except psycopg.OperationalError:
            if not line.has_hung_up:
                raise
            # The connection's state is not known. It must not be used again.
            await conn.close()
            raise unanswered(deadline) from None
        finally:
            line.cancel()
            if isinstance(conn, Connection):
                conn.only_reads = False
    return query.decode(rows)


async def persistently(conn: Connection, query: Query[T], deadline: float) -> T:
    """As `fetch`, and sent again where it lost a fight and changed nothing."""
    for attempt in range(_TRIES):
        try:
            return await fetch(conn, query, deadline=deadline)
        except psycopg.Error as lost:
            if not may_repeat(lost):
                raise
            if attempt == _TRIES - 1 or conn.info.transaction_status is not TransactionStatus.IDLE:
                raise DatabaseUnavailable(f"The database kept refusing a statement: {lost}") from lost
            await asyncio.sleep(0.01 * (attempt + 1))
    raise AssertionError("unreachable")


def unanswered(deadline: float) -> DatabaseUnavailable:
    return DatabaseUnavailable(f"The database did not answer within {deadline:.3g} s.")


def fetch_sync(conn: psycopg.Connection[Any], query: Query[T]) -> T:
    """As `fetch`, blocking; for a connection that belongs to the caller, whose own timeouts apply."""
    with translated():
        cursor = psycopg.Cursor(conn, row_factory=tuple_row)
        cursor.execute(query.text.encode(), query.params, binary=True)
        try:
            rows: Rows = cursor.fetchall() if cursor.description else []
        except Exception:  # noqa: BLE001 - each type has its own errors
            rows = salvaged(cursor)
    return query.decode(rows)


def may_repeat(error: psycopg.Error) -> bool:
    """True for a statement that lost a fight and changed nothing: sending it again is all there is to do. One is routed
    to the default partition while the partition for its day is attached, and is then refused by the default's bounds."""
    if isinstance(error, pg.CheckViolation):
        # A constraint has a name, and what a trigger raises has no table.
        table = error.diag.table_name or ""
        return error.diag.constraint_name is None and table.startswith("finished_runs")
    return isinstance(error, (pg.SerializationFailure, pg.DeadlockDetected))


@contextmanager
def translated() -> Iterator[None]:
    """Driver errors that a caller can act on, as ours; the others pass unchanged."""
    try:
        yield
    except psycopg.Error as error:
        ours = meaning(error)
        if ours is None:
            raise
        raise ours from error


@contextmanager
def copying(pgconn: PGconn) -> Iterator[None]:
    """For a COPY. Where its connection ends in the middle, there may be two answers: what a pooler says, and the end.
    The driver, which expects one, takes that for a mistake of whoever calls it."""
    try:
        yield
    except (psycopg.ProgrammingError, ValueError) as twice:
        if pgconn.status is ConnStatus.OK:
            raise
        raise DatabaseUnavailable(
            "The connection to the database ended while rows were copied into it. Another one is opened for the next call."
        ) from twice
