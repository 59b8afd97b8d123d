"""Django's connection, which belongs to the caller: psycopg's own underneath.

`atomic()` has taken it out of autocommit, and what it is sent first begins the transaction.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg.pq import TransactionStatus

from queue_service.db.borrowed_psycopg import Psycopg, refuse_begun, told
from queue_service.db.query import Query
from queue_service.errors import ConfigError

T = TypeVar("T")


def wrapped(conn: Any) -> Django | None:
    """None for what is none of Django's. ConfigError for one of another kind of database."""
    database, backend = sys.modules.get("django.db"), sys.modules.get("django.db.backends.base.base")
    # `connection` is a proxy for one of `connections`, and no wrapper itself.
    is_proxy = database is not None and conn is database.connection
    if not is_proxy and (backend is None or not isinstance(conn, backend.BaseDatabaseWrapper)):
        return None
    with told(None):
        conn.ensure_connection()
    if not isinstance(conn.connection, psycopg.Connection):
        raise ConfigError(
            f"The Django connection {conn.alias!r} is one to {conn.vendor} without psycopg 3, which our statements need. "
            "Use django.db.backends.postgresql, and install psycopg instead of psycopg2."
        )
    return Django(conn)


class Django(Psycopg):
    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper.connection)
        self._wrapper = wrapper

    def fetch(self, query: Query[T]) -> T:
        with self._as_part():
            return super().fetch(query)

    def copy(self, statement: str, data: str) -> None:
        with self._as_part():
            super().copy(statement, data)

    def begin(self) -> AbstractContextManager[Any]:
        from django.db import transaction  # type: ignore[import-untyped]

        refuse_begun(not self._wrapper.get_autocommit())
        begun: AbstractContextManager[Any] = transaction.atomic(using=self._wrapper.alias)
        return begun

    def in_transaction(self) -> bool:
        # After `set_rollback` the block rolls back when it is left, and says nothing.
        self._wrapper.validate_no_broken_transaction()
        return super().in_transaction()

    @contextmanager
    def _as_part(self) -> Iterator[None]:
        """Django is to know where a statement of ours has failed: who goes on in the block would find it committed, and
        nothing stored."""
        if self._wrapper.needs_rollback:
            raise ConfigError(
                "This atomic() block is to be rolled back, by an error in it or by set_rollback: what is stored in it is "
                "lost. Leave the block first."
            )
        try:
            yield
        finally:
            if self._wrapper.in_atomic_block and self._conn.pgconn.transaction_status == TransactionStatus.INERROR:
                self._wrapper.needs_rollback = True
