"""A connection that belongs to the caller: psycopg's, SQLAlchemy's or Django's, sync or async.

Our statements become part of the caller's transaction: nothing here commits, rolls back or changes a setting, but for
the transactions that `begin` is asked for. SQLAlchemy objects are driven through their own `exec_driver_sql`, so that
their transaction is begun and knows of us. Django's is psycopg's own underneath: `atomic()` has taken it out of
autocommit, and what it is sent first begins the transaction.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from typing import Any, Literal, Protocol, TypeVar

import psycopg
from psycopg import errors as pg
from psycopg.pq import TransactionStatus

from queue_service.db.execute import fetch, fetch_sync, translated
from queue_service.db.query import Query
from queue_service.errors import ConfigError, Deadlock

T = TypeVar("T")

_KINDS = (
    "a psycopg Connection or AsyncConnection, a SQLAlchemy Connection, Session, AsyncConnection or AsyncSession, "
    "or django.db.connection"
)


class SyncBorrowed(Protocol):
    """`begin` is a transaction for the length of a block, made as the connection's own library makes it. It raises
    ConfigError where one is under way. `in_transaction` is False where each statement is committed by itself."""

    is_async: Literal[False]

    def fetch(self, query: Query[T]) -> T: ...
    def copy(self, statement: str, data: str) -> None: ...
    def begin(self) -> AbstractContextManager[Any]: ...
    def in_transaction(self) -> bool: ...


class AsyncFetching(Protocol):
    is_async: Literal[True]

    async def fetch(self, query: Query[T]) -> T: ...
    async def copy(self, statement: str, data: str) -> None: ...


class AsyncBorrowed(AsyncFetching, Protocol):
    """As SyncBorrowed. `driver` is the connection itself."""

    def begin(self) -> AbstractAsyncContextManager[Any]: ...
    async def in_transaction(self) -> bool: ...
    async def driver(self) -> psycopg.AsyncConnection[Any]: ...


def borrow(conn: Any) -> SyncBorrowed | AsyncBorrowed:
    """The caller's connection behind one of two shapes. ConfigError for anything else."""
    if isinstance(conn, psycopg.Connection):
        return _Psycopg(conn)
    if isinstance(conn, psycopg.AsyncConnection):
        return _AsyncPsycopg(conn)
    # An object of SQLAlchemy's, or of Django's, can only exist where that has been imported.
    if "sqlalchemy" in sys.modules:
        wrapped = _sqlalchemy(conn)
        if wrapped is not None:
            return wrapped
    if _is_djangos(conn):
        return _django(conn)
    raise ConfigError(f"conn={type(conn).__name__} cannot be used. Pass {_KINDS}.")


class _Psycopg:
    is_async: Literal[False] = False

    def __init__(self, conn: psycopg.Connection[Any]) -> None:
        self._conn = conn

    def fetch(self, query: Query[T]) -> T:
        with _deadlock_told():
            return fetch_sync(self._conn, query)

    def copy(self, statement: str, data: str) -> None:
        with (
            _deadlock_told(),
            translated(),
            psycopg.Cursor(self._conn) as cursor,
            cursor.copy(statement.encode()) as copy,
        ):
            copy.write(data)

    def begin(self) -> AbstractContextManager[Any]:
        _refuse_begun(_has_begun(self._conn))
        return self._conn.transaction()

    def in_transaction(self) -> bool:
        return not self._conn.autocommit or _has_begun(self._conn)


class _AsyncPsycopg:
    is_async: Literal[True] = True

    def __init__(self, conn: psycopg.AsyncConnection[Any]) -> None:
        self._conn = conn

    async def fetch(self, query: Query[T]) -> T:
        with _deadlock_told():
            return await fetch(self._conn, query)

    async def copy(self, statement: str, data: str) -> None:
        with _deadlock_told(), translated():
            async with psycopg.AsyncCursor(self._conn) as cursor, cursor.copy(statement.encode()) as copy:
                await copy.write(data)

    def begin(self) -> AbstractAsyncContextManager[Any]:
        _refuse_begun(_has_begun(self._conn))
        return self._conn.transaction()

    async def in_transaction(self) -> bool:
        return not self._conn.autocommit or _has_begun(self._conn)

    async def driver(self) -> psycopg.AsyncConnection[Any]:
        return self._conn


class _Django(_Psycopg):
    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper.connection)
        self._wrapper = wrapper

    def begin(self) -> AbstractContextManager[Any]:
        from django.db import transaction  # type: ignore[import-untyped]

        _refuse_begun(not self._wrapper.get_autocommit())
        begun: AbstractContextManager[Any] = transaction.atomic(using=self._wrapper.alias)
        return begun

    def in_transaction(self) -> bool:
        # After `set_rollback` the block rolls back when it is left, and says nothing.
        self._wrapper.validate_no_broken_transaction()
        return super().in_transaction()


class _Alchemy:
    is_async: Literal[False] = False

    def __init__(self, conn: Any) -> None:
        self._conn = conn

    def fetch(self, query: Query[T]) -> T:
        with _deadlock_told():
            return query.decode(_rows(self._connection().exec_driver_sql(query.text, dict(query.params))))

    def copy(self, statement: str, data: str) -> None:
        self._connection().exec_driver_sql("select 1")  # begins the transaction as SQLAlchemy sees it
        self._raw().copy(statement, data)

    def begin(self) -> AbstractContextManager[Any]:
        _refuse_begun(self._conn.in_transaction())
        begun: AbstractContextManager[Any] = self._conn.begin()
        return begun

    def in_transaction(self) -> bool:
        return self._raw().in_transaction()

    def _raw(self) -> _Psycopg:
        return _Psycopg(self._connection().connection.driver_connection)

    def _connection(self) -> Any:
        """The session's, which begins its transaction, or what was given."""
        return self._conn.connection() if hasattr(self._conn, "get_bind") else self._conn


class _AsyncAlchemy:
    is_async: Literal[True] = True

    def __init__(self, conn: Any) -> None:
        self._conn = conn

    async def fetch(self, query: Query[T]) -> T:
        conn = await self._connection()
        with _deadlock_told():
            return query.decode(_rows(await conn.exec_driver_sql(query.text, dict(query.params))))

    async def copy(self, statement: str, data: str) -> None:
        conn = await self._connection()
        await conn.exec_driver_sql("select 1")
        await (await self._raw()).copy(statement, data)

    def begin(self) -> AbstractAsyncContextManager[Any]:
        _refuse_begun(self._conn.in_transaction())
        begun: AbstractAsyncContextManager[Any] = self._conn.begin()
        return begun

    async def in_transaction(self) -> bool:
        return await (await self._raw()).in_transaction()

    async def driver(self) -> psycopg.AsyncConnection[Any]:
        return await (await self._raw()).driver()

    async def _raw(self) -> _AsyncPsycopg:
        conn = await self._connection()
        return _AsyncPsycopg((await conn.get_raw_connection()).driver_connection)

    async def _connection(self) -> Any:
        return await self._conn.connection() if hasattr(self._conn, "sync_session") else self._conn


def _sqlalchemy(conn: Any) -> SyncBorrowed | AsyncBorrowed | None:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session, scoped_session

    if isinstance(conn, scoped_session):
        conn = conn()
    if isinstance(conn, (Session, Connection)):
        _check_driver(conn.get_bind().dialect if isinstance(conn, Session) else conn.dialect)
        return _Alchemy(conn)
    # Importing this needs greenlet, which users of the synchronous half may not have.
    return _async_sqlalchemy(conn) if "sqlalchemy.ext.asyncio" in sys.modules else None


def _async_sqlalchemy(conn: Any) -> AsyncBorrowed | None:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session

    if isinstance(conn, async_scoped_session):
        conn = conn()
    if isinstance(conn, AsyncConnection):
        _check_driver(conn.dialect)
    elif isinstance(conn, AsyncSession):
        _check_driver(conn.get_bind().dialect)
    else:
        return None
    return _AsyncAlchemy(conn)


def _is_djangos(conn: Any) -> bool:
    database, backend = sys.modules.get("django.db"), sys.modules.get("django.db.backends.base.base")
    # `connection` is a proxy for one of `connections`, and no wrapper itself.
    is_proxy = database is not None and conn is database.connection
    return is_proxy or (backend is not None and isinstance(conn, backend.BaseDatabaseWrapper))


def _django(conn: Any) -> SyncBorrowed:
    conn.ensure_connection()
    if not isinstance(conn.connection, psycopg.Connection):
        raise ConfigError(
            f"The Django connection {conn.alias!r} is one to {conn.vendor} without psycopg 3, which our statements need. "
            "Use django.db.backends.postgresql, and install psycopg instead of psycopg2."
        )
    return _Django(conn)


@contextmanager
def _deadlock_told() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # SQLAlchemy's errors hold the driver's.
        if isinstance(getattr(error, "orig", error), pg.DeadlockDetected):
            raise Deadlock from error
        raise


def _has_begun(conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
    return conn.info.transaction_status not in {TransactionStatus.IDLE, TransactionStatus.UNKNOWN}


def _refuse_begun(has_begun: bool) -> None:
    if has_begun:
        raise ConfigError(
            "This connection is in the middle of a transaction, and the block is to be one of its own. Commit or roll back "
            "first, or give another connection."
        )


def _check_driver(dialect: Any) -> None:
    if dialect.driver not in {"psycopg", "psycopg_async"}:
        raise ConfigError(
            f"The SQLAlchemy engine uses {dialect.name}+{dialect.driver}; our statements need psycopg 3. "
            "Create it with a postgresql+psycopg:// URL."
        )


def _rows(result: Any) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in result.all()] if result.returns_rows else []
