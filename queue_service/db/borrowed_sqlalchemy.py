"""SQLAlchemy's connections and sessions, sync and async, that belong to the caller.

SQLAlchemy begins the transaction, and so knows of it. The statements go straight to psycopg's connection underneath: what
listens to SQLAlchemy's own statements neither changes ours nor logs what they carry.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any, Literal, TypeVar

import psycopg
from sqlalchemy import Connection, TwoPhaseTransaction, update
from sqlalchemy.exc import InvalidRequestError, PendingRollbackError, ResourceClosedError, UnboundExecutionError
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.util import await_only

from queue_service.db.borrowed_psycopg import AsyncPsycopg, Psycopg, refuse_begun, refuse_two_phases, told
from queue_service.db.query import Query
from queue_service.db.tables import runs
from queue_service.errors import ConfigError

T = TypeVar("T")


def wrapped(conn: Any) -> Alchemy | AsyncAlchemy | None:
    """None for what is none of these."""
    if isinstance(conn, scoped_session):
        conn = conn()
    if isinstance(conn, (Session, Connection)):
        _check_driver(_bind(conn).dialect if isinstance(conn, Session) else conn.dialect)
        return Alchemy(conn)
    # Importing this needs greenlet, which users of the synchronous half may not have.
    return _wrapped_async(conn) if "sqlalchemy.ext.asyncio" in sys.modules else None


def _wrapped_async(conn: Any) -> AsyncAlchemy | None:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session

    if isinstance(conn, async_scoped_session):
        conn = conn()
    if isinstance(conn, AsyncConnection):
        with _told():
            _check_driver(conn.dialect)
    elif isinstance(conn, AsyncSession):
        _check_driver(_bind(conn.sync_session).dialect)
    else:
        return None
    return AsyncAlchemy(conn)


class Alchemy:
    is_async: Literal[False] = False

    def __init__(self, conn: Any) -> None:
        self._conn = conn

    def fetch(self, query: Query[T]) -> T:
        with self._driver(writes=query.writes) as driver:
            return driver.fetch(query)

    def copy(self, statement: str, data: str) -> None:
        with self._driver(writes=True) as driver:
            driver.copy(statement, data)

    def begin(self) -> AbstractContextManager[Any]:
        refuse_begun(self._conn.in_transaction())
        begun: AbstractContextManager[Any] = self._conn.begin()
        return begun

    def in_transaction(self) -> bool:
        with self._driver() as driver:
            return driver.in_transaction()

    def can_copy(self) -> bool:
        with self._driver() as driver:
            return driver.can_copy()

    @contextmanager
    def _driver(self, *, writes: bool = False) -> Iterator[Psycopg | Awaited]:
        """The driver's connection, in a transaction as SQLAlchemy sees it, which sends nothing. SQLAlchemy hears of it
        where the server was lost: it then rolls back without asking, and gives that connection to nobody."""
        with _told():
            conn = self._conn
            if isinstance(conn, Session):
                conn = conn.connection(bind_arguments={"bind": _bind(conn)})
            elif not conn.in_transaction():
                conn.begin()
            # Until SQLAlchemy 2.1 the driver does not know.
            refuse_two_phases(writes and isinstance(conn.get_transaction(), TwoPhaseTransaction))
            driver = conn.connection.driver_connection
        try:
            yield Psycopg(driver) if isinstance(driver, psycopg.Connection) else Awaited(driver)
        finally:
            if driver.closed:
                conn.invalidate()


class Awaited:
    """The driver's connection under an asynchronous engine, for who holds the blocking side of it: in `run_sync`, or in
    what listens to a session. SQLAlchemy waits there for what is asynchronous."""

    def __init__(self, conn: psycopg.AsyncConnection[Any]) -> None:
        self._conn = AsyncPsycopg(conn)

    def fetch(self, query: Query[T]) -> T:
        return self._waited(self._conn.fetch(query))

    def copy(self, statement: str, data: str) -> None:
        self._waited(self._conn.copy(statement, data))

    def in_transaction(self) -> bool:
        return self._waited(self._conn.in_transaction())

    def can_copy(self) -> bool:
        return self._waited(self._conn.can_copy())

    def _waited(self, call: Coroutine[Any, Any, T]) -> T:
        # Where there is nobody to wait, SQLAlchemy says so, and closes it.
        with _told():
            return await_only(call)


class AsyncAlchemy:
    is_async: Literal[True] = True

    def __init__(self, conn: Any) -> None:
        self._conn = conn

    async def fetch(self, query: Query[T]) -> T:
        async with self._driver(writes=query.writes) as driver:
            return await driver.fetch(query)

    async def copy(self, statement: str, data: str) -> None:
        async with self._driver(writes=True) as driver:
            await driver.copy(statement, data)

    def begin(self) -> AbstractAsyncContextManager[Any]:
        refuse_begun(self._conn.in_transaction())
        begun: AbstractAsyncContextManager[Any] = self._conn.begin()
        return begun

    async def in_transaction(self) -> bool:
        async with self._driver() as driver:
            return await driver.in_transaction()

    async def driver(self) -> psycopg.AsyncConnection[Any]:
        async with self._driver() as driver:
            return await driver.driver()

    async def can_copy(self) -> bool:
        async with self._driver() as driver:
            return await driver.can_copy()

    @asynccontextmanager
    async def _driver(self, *, writes: bool = False) -> AsyncIterator[AsyncPsycopg]:
        """As of `Alchemy`."""
        with _told():
            conn = self._conn
            if hasattr(conn, "sync_session"):
                conn = await conn.connection(bind_arguments={"bind": _bind(conn.sync_session)})
            elif not conn.in_transaction():
                await conn.begin()
            refuse_two_phases(writes and isinstance(conn.sync_connection.get_transaction(), TwoPhaseTransaction))
            driver = (await conn.get_raw_connection()).driver_connection
        try:
            yield AsyncPsycopg(driver)
        finally:
            if driver.closed:
                await conn.invalidate()


def _bind(session: Session) -> Any:
    """The engine or connection that the session has for our tables: by its own rules, asked about a write to `runs`, or
    else the one connection that it has. ConfigError where it has neither."""
    try:
        return session.get_bind(clause=update(runs))
    except UnboundExecutionError:
        transaction = session.get_transaction()
        # It has no public name.
        entries = getattr(transaction, "_connections", {})
        connections = {id(entry[0]): entry[0] for entry in entries.values()}
    if len(connections) == 1:
        return next(iter(connections.values()))
    raise ConfigError(
        f"This session has no bind but for mappers, and {len(connections) or 'no'} connections so far, so nothing says in "
        "which database the run belongs. Add queue_service.db.tables.runs to its binds= with that engine, or pass "
        "conn=session.connection(bind_arguments={'mapper': …})."
    )


def _check_driver(dialect: Any) -> None:
    if dialect.driver not in {"psycopg", "psycopg_async"}:
        raise ConfigError(
            f"The SQLAlchemy engine uses {dialect.name}+{dialect.driver}; our statements need psycopg 3. "
            "Create it with a postgresql+psycopg:// URL."
        )


@contextmanager
def _told() -> Iterator[None]:
    """What keeps SQLAlchemy from giving its connection, as ours."""
    try:
        with told(None):
            yield
    except PendingRollbackError as failed:
        raise ConfigError(
            "A statement of this transaction has failed before, and SQLAlchemy takes nothing more of it. Roll it back, and "
            "begin again."
        ) from failed
    except (InvalidRequestError, ResourceClosedError) as refused:
        raise ConfigError(f"SQLAlchemy does not give its connection: {str(refused).splitlines()[0]}") from refused
