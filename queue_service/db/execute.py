"""The two executors of a `Query`, and the one place where driver errors become ours.

Every call has a deadline on this side as well as the server's `statement_timeout`: a peer that stopped answering
(black hole, stopped process) would otherwise hold its caller until TCP gives up.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg import errors as pg
from psycopg.pq.abc import PGcancel
from psycopg.rows import tuple_row

from queue_service.db.meaning import meaning
from queue_service.db.query import Query, Rows
from queue_service.db.rows import salvaged
from queue_service.errors import DatabaseRefused, DatabaseUnavailable, SchemaMismatch

T = TypeVar("T")

DEADLINE = 30.0

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


async def fetch(conn: psycopg.AsyncConnection[Any], query: Query[T], *, deadline: float = DEADLINE) -> T:
    """Run the query and decode its rows. On DatabaseUnavailable from a passed deadline the connection is closed."""
    deadline_timer = _Deadline(conn, deadline)
    with translated(), cancellable():
        try:
            # Not conn.cursor(): a caller's connection may make cursors and rows of other kinds.
            cursor = psycopg.AsyncCursor(conn, row_factory=tuple_row)
            await cursor.execute(query.text.encode(), query.params, binary=True)
            try:
                rows: Rows = await cursor.fetchall() if cursor.description else []
            except Exception:  # noqa: BLE001 - each type has its own errors
                rows = salvaged(cursor)
        except psycopg.OperationalError:
            if not deadline_timer.has_passed:
                raise
            # Whether the statement ran is not known; the connection's state is not either. It must not be used again.
            await conn.close()
            raise DatabaseUnavailable(f"The database did not answer within {deadline:g} s.") from None
        finally:
            deadline_timer.cancel()
    return query.decode(rows)


class _Deadline:
    """Hangs up when it passes: whoever waits on the connection then hears that it has ended. To be cancelled would take
    longer: psycopg then has the statement cancelled on the server, and waits 5 s for one that does not answer."""

    def __init__(self, conn: psycopg.AsyncConnection[Any], seconds: float) -> None:
        self.has_passed = False
        self._conn = conn
        self._timer = asyncio.get_running_loop().call_later(seconds, self._hang_up)

    def cancel(self) -> None:
        self._timer.cancel()

    def _hang_up(self) -> None:
        self.has_passed = True
        # Or the server, which does not look who listens, would go on with the statement. Nobody waits for this.
        with contextlib.suppress(OSError, psycopg.Error):
            cancel = self._conn.pgconn.get_cancel()
            threading.Thread(target=_cancelled_there, args=[cancel], name="queue_service cancel", daemon=True).start()
            with socket.socket(fileno=os.dup(self._conn.pgconn.socket)) as line:
                line.shutdown(socket.SHUT_RDWR)


def _cancelled_there(cancel: PGcancel) -> None:
    with contextlib.suppress(psycopg.Error):
        cancel.cancel()


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
        return error.diag.constraint_name is None and "partition constraint" in str(error)
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
