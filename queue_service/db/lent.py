"""A connection that a handler has for the length of a block, in a transaction that was begun for it.

No wait on it is without an end: where the server says nothing for too long, in whatever the handler or we have it do, the
line is cut. It is also cut where somebody stops waiting for what may be a commit, and the server is left to itself: to
cancel it there would end its wait for a synchronous standby. Only a statement that surely commits nothing is cancelled.

What one block has left behind, in the session or in the driver's object, is not met by the next: an object serves one block
only, and the session begins anew behind each. Behind a transaction pooler the session is not ours to change, so what a
block needs holds for its transaction only, everywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import re
import threading
import time
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg import errors as pg
from psycopg import pq, sql
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from psycopg.waiting import Ready, wait_async, wait_selector

from queue_service.db.execute import WAIT_INTERVAL, cancellable
from queue_service.db.hangup import cancel_there, shut
from queue_service.errors import ConfigError, DatabaseUnavailable

T = TypeVar("T")

# Of what we have the server do ourselves at either end of a block: how long it may say nothing.
OURS = 10.0
# How long a statement that is cancelled may take to end, before its line is cut.
CANCEL_SECONDS = 1.0

# A handler that is stuck, or whose machine is gone, keeps neither its locks nor what vacuum would remove: the server rolls
# back a transaction that is idle for 60 s, and looks after 10 s whether anybody is there. Qualified, since the search path
# is the handler's.
_BEGIN: LiteralString = """
begin isolation level read committed;
select pg_catalog.pg_backend_pid(), pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('transaction_read_only'),
       pg_catalog.current_setting('session_replication_role'),
       pg_catalog.set_config('idle_in_transaction_session_timeout', '60s', true),
       pg_catalog.set_config('tcp_keepalives_idle', '10', true),
       pg_catalog.set_config('tcp_keepalives_interval', '5', true),
       pg_catalog.set_config('tcp_keepalives_count', '3', true),
       pg_catalog.set_config('synchronous_commit',
                             case when pg_catalog.current_setting('synchronous_commit') operator(pg_catalog.=) 'off'
                                  then 'on' else pg_catalog.current_setting('synchronous_commit') end, true)
"""
_BE_ORIGIN: LiteralString = "select pg_catalog.set_config('session_replication_role', 'origin', true)"

# Whatever may end a transaction so that it counts. `end` is in many a `case` as well, which then costs a connection.
_MAY_COMMIT = re.compile(rb"\b(?:commit|end|prepare)\b", re.IGNORECASE)

# Whether the statement that this code executes surely commits nothing.
_is_ordinary: contextvars.ContextVar[bool] = contextvars.ContextVar("queue_service_is_ordinary", default=False)


class Unfit(Exception):
    """A connection that cannot be lent; another one may be fit."""


class _Lent:
    """What both halves are: `silence` is how many seconds the server may say nothing."""

    pgconn: pq.abc.PGconn
    silence = OURS
    is_pooled = False
    #: (monotonic) When it is to be replaced.
    ends_at = 0.0
    # Nobody but its handler cuts it from now on: what is done in the block may be committed.
    is_ending = False
    # The statement that is under way may be cancelled.
    is_cancellable = False

    def __init__(self, pgconn: pq.abc.PGconn, *args: Any) -> None:
        # While one thread closes the socket, another that is about to cut it would cut somebody else's.
        self._cutting = threading.Lock()
        super().__init__(pgconn, *args)  # type: ignore[call-arg]  # of psycopg's class behind it

    def hang_up(self) -> None:
        """Close it, as whoever uses it."""
        with self._cutting:
            if self.is_cancellable:
                cancel_there(self.pgconn)
            self.pgconn.finish()

    def cut(self) -> bool:
        """Let its user hear that it has ended. False where it may be committing, and goes on. From any thread."""
        with self._cutting:
            if self.is_ending:
                return False
            with contextlib.suppress(OSError, psycopg.Error):
                if self.is_cancellable:
                    cancel_there(self.pgconn)
                shut(self.pgconn.socket)
            return True

    def stripped(self) -> pq.abc.PGconn:
        """The bare connection, for another object. This one is closed from now on, also for who has kept it."""
        with self._cutting:
            bare, self.pgconn = self.pgconn, _closed_pgconn()
        return bare

    def _begins_to_wait(self) -> None:
        self.is_cancellable = (
            _is_ordinary.get()
            and self.pgconn.transaction_status == TransactionStatus.INTRANS
            and self.pgconn.pipeline_status == pq.PipelineStatus.OFF
        )

    def _check(self, row: Any, pid: int | None) -> bool:
        """Whether the triggers that keep our tables have to be turned on. Raises Unfit."""
        backend, in_recovery, read_only, replication_role, *_ = row
        self.is_pooled = pid is not None and backend != pid
        if in_recovery or read_only == "on":
            kind = "it is a standby" if in_recovery else "default_transaction_read_only is on"
            raise Unfit(f"The database takes no writes: {kind}.")
        return bool(replication_role != "origin")


class LentAsyncConnection(_Lent, psycopg.AsyncConnection[Any]):
    def __init__(self, pgconn: pq.abc.PGconn, *args: Any) -> None:
        super().__init__(pgconn, *args)
        self.cursor_factory = _AsyncCursor

    async def wait(self, gen: PQGen[T], interval: float = WAIT_INTERVAL, timeout: float | None = None) -> T:
        self._begins_to_wait()
        bounded = _bounded(gen, self.silence)
        try:
            with cancellable():
                return await wait_async(bounded, self.pgconn.socket, interval=interval, **_bounds(timeout))
        except _Silence:
            self.hang_up()
            raise _cut_off(self.silence) from None
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE and not await self._has_ended(bounded):
                self.hang_up()
            raise
        finally:
            self.is_cancellable = False

    async def _has_ended(self, statement: PQGen[Any]) -> bool:
        """Whether the statement could be cancelled, so that the connection can be used again."""
        if not (self.is_cancellable and psycopg.capabilities.has_cancel_safe()):
            return False
        try:
            async with asyncio.timeout(CANCEL_SECONDS):
                await self.cancel_safe(timeout=CANCEL_SECONDS)
                await wait_async(statement, self.pgconn.socket, interval=WAIT_INTERVAL)
        except (psycopg.Error, _Silence, TimeoutError, asyncio.CancelledError):
            pass
        return self.pgconn.transaction_status in {TransactionStatus.INTRANS, TransactionStatus.INERROR}

    async def begin(self, pid: int | None) -> None:
        """Begin the transaction of a block. `pid` is that of the backend which has shaken hands; None where nothing can be
        in between that makes it another. Raises Unfit, and ConfigError where our triggers would not fire."""
        await self.set_autocommit(True)
        cursor = psycopg.AsyncCursor(self, row_factory=tuple_row)
        await cursor.execute(_BEGIN, prepare=False)
        cursor.nextset()
        if self._check(await cursor.fetchone(), pid):
            with _only_for_superusers():
                await cursor.execute(_BE_ORIGIN, prepare=False)
        if self.is_pooled:
            self.prepare_threshold = None

    async def commit(self) -> None:
        raise _not_here("commit")

    async def rollback(self) -> None:
        raise _not_here("rollback")

    async def end(self, *, commits: bool) -> None:
        """Commit, or roll back without a word where that cannot be done any more."""
        if commits:
            await super().commit()
            return
        self.silence = min(self.silence, OURS)
        try:
            await super().rollback()
        except (Exception, asyncio.CancelledError) as failed:
            self.hang_up()
            if isinstance(failed, asyncio.CancelledError):
                raise

    async def reset(self) -> bool:
        """Let its session begin anew, for the next block. False where it cannot be used any more."""
        if self.pgconn.transaction_status == TransactionStatus.IDLE and not self.is_pooled:
            self.silence = OURS
            with contextlib.suppress(psycopg.Error, DatabaseUnavailable):
                await psycopg.AsyncCursor(self).execute("discard all", prepare=False)
        return self.pgconn.transaction_status == TransactionStatus.IDLE


class LentConnection(_Lent, psycopg.Connection[Any]):
    """As LentAsyncConnection, blocking."""

    def __init__(self, pgconn: pq.abc.PGconn, *args: Any) -> None:
        super().__init__(pgconn, *args)
        self.cursor_factory = _Cursor

    def wait(self, gen: PQGen[T], interval: float = WAIT_INTERVAL, timeout: float | None = None) -> T:
        self._begins_to_wait()
        try:
            # Not psycopg's fastest: that of 3.2 says that there is something to read when nothing has come.
            return wait_selector(_bounded(gen, self.silence), self.pgconn.socket, interval=interval, **_bounds(timeout))
        except _Silence:
            self.hang_up()
            raise _cut_off(self.silence) from None
        except (KeyboardInterrupt, SystemExit):
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                self.hang_up()
            raise
        finally:
            self.is_cancellable = False

    def begin(self, pid: int | None) -> None:
        self.autocommit = True
        cursor = psycopg.Cursor(self, row_factory=tuple_row)
        cursor.execute(_BEGIN, prepare=False)
        cursor.nextset()
        if self._check(cursor.fetchone(), pid):
            with _only_for_superusers():
                cursor.execute(_BE_ORIGIN, prepare=False)
        if self.is_pooled:
            self.prepare_threshold = None

    def commit(self) -> None:
        raise _not_here("commit")

    def rollback(self) -> None:
        raise _not_here("rollback")

    def end(self, *, commits: bool) -> None:
        if commits:
            super().commit()
            return
        self.silence = min(self.silence, OURS)
        try:
            super().rollback()
        except Exception:  # noqa: BLE001 - the server does it for who has hung up
            self.hang_up()

    def reset(self) -> bool:
        if self.pgconn.transaction_status == TransactionStatus.IDLE and not self.is_pooled:
            self.silence = OURS
            with contextlib.suppress(psycopg.Error, DatabaseUnavailable):
                psycopg.Cursor(self).execute("discard all", prepare=False)
        return self.pgconn.transaction_status == TransactionStatus.IDLE


class _AsyncCursor(psycopg.AsyncCursor[Any]):
    async def execute(self, query: Any, *args: Any, **options: Any) -> Any:
        token = _is_ordinary.set(_commits_nothing(query, self.connection))
        try:
            return await super().execute(query, *args, **options)
        finally:
            _is_ordinary.reset(token)


class _Cursor(psycopg.Cursor[Any]):
    def execute(self, query: Any, *args: Any, **options: Any) -> Any:
        token = _is_ordinary.set(_commits_nothing(query, self.connection))
        try:
            return super().execute(query, *args, **options)
        finally:
            _is_ordinary.reset(token)


class _Silence(Exception):
    pass


def _bounded(gen: PQGen[T], seconds: float) -> PQGen[T]:
    """What `gen` does, until the socket has been of no use for so long. psycopg sends it an empty word several times a
    second, if nothing else."""
    heard_at = time.monotonic()
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if ready:
                heard_at = time.monotonic()
            elif time.monotonic() - heard_at > seconds:
                raise _Silence
            wanted = gen.send(ready or Ready.NONE)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


def _commits_nothing(query: Any, conn: Any) -> bool:
    """Whether it is text that can be read, and says nothing of the kind."""
    if isinstance(query, sql.Composable):
        query = query.as_bytes(conn)
    if isinstance(query, str):
        query = query.encode()
    return isinstance(query, bytes) and _MAY_COMMIT.search(query) is None


def _bounds(timeout: float | None) -> dict[str, Any]:
    # psycopg 3.2 has no `timeout`, and gives none.
    return {} if timeout is None else {"timeout": timeout}


@functools.cache
def _closed_pgconn() -> pq.abc.PGconn:
    """One for all."""
    closed = pq.PGconn.connect_start(b"host=/")
    closed.finish()
    return closed


@contextlib.contextmanager
def _only_for_superusers() -> Any:
    try:
        yield
    except pg.InsufficientPrivilege:
        raise ConfigError(
            "session_replication_role is not `origin` for this role, so the triggers that keep our tables do not fire. "
            "Take the setting back: alter role … reset session_replication_role."
        ) from None


def _cut_off(seconds: float) -> DatabaseUnavailable:
    return DatabaseUnavailable(
        f"The database has said nothing for {seconds:g} s about a statement of this handler's transaction, and its "
        "connection was cut: what the transaction wrote does not count, unless it was committed at that moment. A "
        "statement that takes longer needs a longer QUEUE_SERVICE_LENT_STATEMENT_TIMEOUT."
    )


def _not_here(verb: str) -> psycopg.ProgrammingError:
    return psycopg.ProgrammingError(
        f"{verb}() is not for this connection: its block commits when it is left, and rolls back when an exception leaves "
        "it. For a part that may fail use `conn.transaction()`, a savepoint."
    )
