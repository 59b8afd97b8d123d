"""Which revisions of the schema this code works on, and which code a database works with.

Both sides say how far back they go, so that code and schema need not be exchanged at one moment: code goes on when the
schema gets ahead of it, until a migration takes away what it uses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import psycopg
from psycopg import errors as pg

from queue_service.db.query import Query, Rows
from queue_service.errors import SchemaMismatch

#: What this code was built for.
HEAD = "0026"
#: The oldest revision of a schema that this code works on: the newest expand. What comes after it only takes away.
OLDEST = "0025"
#: The first code that says in its row of `workers` and `gateways` for which revision it was built.
FIRST_TO_SAY = "0022"
#: What code that says nothing was built for, at the latest.
LAST_SILENT = "0021"


class Schema(NamedTuple):
    """What a database says of its schema; without a revision, none is there. `oldest_code` is the oldest HEAD of code that
    works on it, which no database before FIRST_TO_SAY says."""

    revision: str | None = None
    oldest_code: str | None = None

    @property
    def works(self) -> bool:
        """Whether this code works on it."""
        return self.is_new_enough and self.takes_this_code

    @property
    def is_new_enough(self) -> bool:
        return self.revision is not None and self.revision >= OLDEST

    @property
    def takes_this_code(self) -> bool:
        if self.oldest_code is None:
            return self.revision is None or self.revision < FIRST_TO_SAY
        return self.oldest_code <= HEAD

    def mismatch(self) -> SchemaMismatch:
        """Why this code does not work on it."""
        if not self.takes_this_code:
            return SchemaMismatch(self.revision, HEAD, newer=True, oldest_code=self.oldest_code)
        return SchemaMismatch(self.revision, OLDEST)


def _schema(rows: Rows) -> Schema:
    return Schema(*rows[0]) if rows else Schema()


# The column is there since FIRST_TO_SAY. For a pool: SchemaMismatch where there is no schema.
SCHEMA: Query[Schema] = Query(
    "select version_num, pg_catalog.to_jsonb(v) ->> 'oldest_code'::text from queue_service.alembic_version as v",
    _schema,
    writes=False,
)


async def look(conn: psycopg.AsyncConnection[Any]) -> Schema:
    """What the database says."""
    try:
        cursor = await conn.execute(SCHEMA.text.encode())
    except (pg.UndefinedTable, pg.InvalidSchemaName):
        return Schema()
    return SCHEMA.decode(await cursor.fetchall())


async def current(conn: psycopg.AsyncConnection[Any]) -> str | None:
    """The revision the database is at; None where there is no schema yet."""
    return (await look(conn)).revision


async def require(conn: psycopg.AsyncConnection[Any]) -> None:
    """Raise SchemaMismatch unless this code works on the database."""
    found = await look(conn)
    if not found.works:
        raise found.mismatch()
