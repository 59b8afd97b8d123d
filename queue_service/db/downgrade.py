"""Going back to an older revision: what that would drop, and what stands against it.

Nothing is written down about each revision, since a list would go stale: the downgrade is made in a transaction, what is
missing then is what it drops, and the transaction is rolled back unless it was asked to commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psycopg
import sqlalchemy

from queue_service.db import schema
from queue_service.db.pool import options
from queue_service.db.revision import HEAD
from queue_service.errors import ConfigError

# Rows of a table are counted up to here.
COUNTED = 100_000

_COLUMNS = """
select table_name, column_name from information_schema.columns
 where table_schema = 'queue_service' and table_name not like 'finished\\_runs\\_%%' and table_name <> 'alembic_version'
"""
# Nobody may arm a turn or enqueue a run between the look and the drop.
_LOCK = "lock table queue_service.{} in exclusive mode"


@dataclass(frozen=True, slots=True)
class Losses:
    """Tables that go, with their number of rows (up to COUNTED), and columns that go from tables which stay."""

    tables: dict[str, int]
    columns: Sequence[str]

    def __str__(self) -> str:
        tables = [f"table {name} ({_rows(count)})" for name, count in self.tables.items()]
        return "\n".join([*tables, *(f"column {name}" for name in self.columns)]) or "no table and no column"


def downgrade(conninfo: str, to: str, *, lease: timedelta, force: bool, commit: bool) -> Losses:
    """What a downgrade to revision `to` drops; with `commit` it has dropped that. The tables are locked meanwhile.

    Raises ConfigError while turns are owed an ending, workers were seen within `lease`, or runs that are not over would be
    dropped, unless `force` says that all of this may be lost.
    """
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(options(conninfo, "queue_service migrate")),
        poolclass=sqlalchemy.NullPool,
        # Each statement has to see what was committed while it waited for a lock, whatever the server's default is.
        isolation_level="READ COMMITTED",
    )
    with engine.connect() as connection:
        connection.exec_driver_sql("set local lock_timeout = '10s'")
        before = _columns(connection)
        needed = _needed(connection, before, lease)
        counts = {table: _count(connection, table) for table, _ in before}
        schema.downgrade(connection, to)
        losses = _compared(before, _columns(connection), counts)
        if losses.tables.get("runs"):
            needed.append(f"{_rows(losses.tables['runs'])} in the queue, which would be lost")
        if needed and not force:
            connection.rollback()
            raise ConfigError(
                f"The database is in use: {'; '.join(needed)}. Stop the workers and wait for the turns to end, or say "
                "--force to drop it all the same. Nothing was changed."
            )
        if commit:
            connection.commit()
    return losses


def is_older(have: str | None, to: str) -> bool:
    """Whether `to` is a revision before the one the database has."""
    return have is not None and (to == "base" or (to != "head" and to < have <= HEAD))


def _needed(connection: Any, columns: set[tuple[str, str]], lease: timedelta) -> list[str]:
    """What stands against dropping anything, as clauses. Locks what it looks at."""
    tables = {table for table, _ in columns}
    for table in sorted({"runs", "turn_markers"} & tables):
        connection.exec_driver_sql(_LOCK.format(table))
    found = []
    if "turn_markers" in tables and (owed := _count(connection, "turn_markers")):
        found.append(f"{owed:,} {'turn is' if owed == 1 else 'turns are'} owed an ending")
    if "workers" in tables:
        seen = "select count(*) from queue_service.workers where seen_at > clock_timestamp() - %(lease)s::interval"
        live = connection.exec_driver_sql(seen, {"lease": lease}).scalar_one()
        if live:
            found.append(f"{live:,} {'worker is' if live == 1 else 'workers are'} at work")
    return found


def _columns(connection: Any) -> set[tuple[str, str]]:
    return {(table, column) for table, column in connection.exec_driver_sql(_COLUMNS, {}).all()}


def _count(connection: Any, table: str) -> int:
    # The name comes from the catalogue, or from this module.
    rows = f'select count(*) from (select from queue_service."{table}" limit {COUNTED + 1}) as counted'  # noqa: S608
    count: int = connection.exec_driver_sql(rows).scalar_one()
    return count


def _compared(before: set[tuple[str, str]], after: set[tuple[str, str]], counts: dict[str, int]) -> Losses:
    stay = {table for table, _ in after}
    gone = sorted({table for table, _ in before} - stay)
    columns = sorted(f"{table}.{column}" for table, column in before - after if table in stay)
    return Losses({table: counts[table] for table in gone}, columns)


def _rows(count: int) -> str:
    if count > COUNTED:
        return f"more than {COUNTED:,} rows"
    return f"{count:,} {'row' if count == 1 else 'rows'}"
