"""Which revision of the schema this code was built for, and which one a database has."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import errors as pg

from queue_service.db.query import Query, scalar
from queue_service.errors import SchemaMismatch

HEAD = "0021"

# For a pool: SchemaMismatch where there is no schema.
REVISION: Query[str | None] = Query("select version_num from queue_service.alembic_version", scalar, writes=False)


async def current(conn: psycopg.AsyncConnection[Any]) -> str | None:
    """The revision the database is at; None where there is no schema yet."""
    try:
        cursor = await conn.execute(REVISION.text.encode())
    except (pg.UndefinedTable, pg.InvalidSchemaName):
        return None
    row = await cursor.fetchone()
    return None if row is None else str(row[0])


async def require(conn: psycopg.AsyncConnection[Any]) -> None:
    """Raise SchemaMismatch unless the database is at exactly our revision."""
    have = await current(conn)
    if have != HEAD:
        raise SchemaMismatch(have, HEAD, newer=have is not None and have > HEAD)
