"""A connection that belongs to the caller: psycopg's, SQLAlchemy's or Django's, sync or async.

Our statements become part of the caller's transaction: nothing here commits, rolls back or changes a setting, but for
the transactions that `begin` is asked for. What belongs to which library is in the modules of its name.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, Literal, Protocol, TypeVar

import psycopg

from queue_service.db import borrowed_django
from queue_service.db.borrowed_psycopg import AsyncPsycopg, Psycopg
from queue_service.db.query import Query
from queue_service.errors import ConfigError

T = TypeVar("T")

_KINDS = (
    "a psycopg Connection or AsyncConnection, a SQLAlchemy Connection, Session, AsyncConnection or AsyncSession, "
    "or django.db.connection"
)
# What is passed by mistake: the classes of which packages have such a name, and what to pass instead.
_NEAR_MISSES = [
    ("psycopg_pool", "Pool", "It is a pool: take a connection out of it, `with pool.connection() as conn`."),
    ("sqlalchemy", "Engine", "It is an engine: take a connection out of it, `with engine.begin() as conn`."),
    ("sqlalchemy", "sessionmaker", "It makes sessions: call it, and pass the session."),
    ("sqlalchemy", "Transaction", "It is a transaction: pass its connection or session."),
    ("sqlalchemy", "ConnectionFairy", "It is a raw connection: pass its `driver_connection`."),
    ("flask_sqlalchemy", "", "It is the extension: pass its `session`."),
    ("psycopg", "Cursor", "It is a cursor: pass its `connection`."),
    ("django", "Cursor", "It is a cursor: pass django.db.connection."),
    ("django", "ConnectionHandler", "It has connections: pass one of them, such as connections['default']."),
    ("psycopg2", "", "It is psycopg2's; our statements need psycopg 3."),
    ("asyncpg", "", "It is asyncpg's; our statements need psycopg 3."),
]


class SyncBorrowed(Protocol):
    """`begin` is a transaction for the length of a block, made as the connection's own library makes it. It raises
    ConfigError where one is under way. `in_transaction` is False where each statement is committed by itself, `can_copy` in
    pipeline mode."""

    is_async: Literal[False]

    def fetch(self, query: Query[T]) -> T: ...
    def copy(self, statement: str, data: str) -> None: ...
    def begin(self) -> AbstractContextManager[Any]: ...
    def in_transaction(self) -> bool: ...
    def can_copy(self) -> bool: ...


class AsyncFetching(Protocol):
    is_async: Literal[True]

    async def fetch(self, query: Query[T]) -> T: ...
    async def copy(self, statement: str, data: str) -> None: ...


class AsyncBorrowed(AsyncFetching, Protocol):
    """As SyncBorrowed. `driver` is the connection itself."""

    def begin(self) -> AbstractAsyncContextManager[Any]: ...
    async def in_transaction(self) -> bool: ...
    async def can_copy(self) -> bool: ...
    async def driver(self) -> psycopg.AsyncConnection[Any]: ...


def borrow(conn: Any) -> SyncBorrowed | AsyncBorrowed:
    """The caller's connection behind one of two shapes. ConfigError for anything else."""
    if isinstance(conn, psycopg.Connection):
        return Psycopg(conn)
    if isinstance(conn, psycopg.AsyncConnection):
        return AsyncPsycopg(conn)
    # An object of SQLAlchemy's, or of Django's, can only exist where that has been imported.
    if "sqlalchemy" in sys.modules:
        from queue_service.db import borrowed_sqlalchemy

        wrapped = borrowed_sqlalchemy.wrapped(conn)
        if wrapped is not None:
            return wrapped
    django = borrowed_django.wrapped(conn)
    if django is not None:
        return django
    raise ConfigError(f"conn={type(conn).__name__} cannot be used. {_instead(conn)}Pass {_KINDS}.")


def _instead(conn: Any) -> str:
    if inspect.iscoroutine(conn):
        conn.close()
        return "It was not awaited. "
    for each in type(conn).__mro__:
        package = each.__module__.partition(".")[0]
        for of_package, name, advice in _NEAR_MISSES:
            if package == of_package and name in each.__name__:
                return f"{advice} "
    return ""
