"""A single session, which is opened again when it breaks."""

from __future__ import annotations

import functools
from typing import TypeVar

from queue_service.db.execute import DEADLINE, persistently
from queue_service.db.query import Query
from queue_service.db.session import Address, Session, connect
from queue_service.errors import DatabaseUnavailable

T = TypeVar("T")


class OwnConnection:
    """One connection of its own for one coroutine: never shared, so it never waits in a queue behind anyone's work.

    A broken one is replaced at the next `fetch`; the failed call itself raises DatabaseUnavailable, because only the
    caller knows whether repeating it is right.
    """

    def __init__(self, where: str | Address, *, application: str) -> None:
        self._connect = functools.partial(connect, Address.of(where), application=application)
        self._conn: Session | None = None

    async def fetch(self, query: Query[T], *, deadline: float = DEADLINE) -> T:
        conn = self._conn
        if conn is not None and not (conn.is_usable and (conn.is_quiet or await conn.is_writable())):
            await self.close()
        if self._conn is None:
            self._conn = await self._connect()
        try:
            return await persistently(self._conn, query, deadline)
        except DatabaseUnavailable:
            await self.close()
            raise

    async def close(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            conn.pgconn.finish()
