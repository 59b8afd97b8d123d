"""Going back to an older revision: what that would drop, and what stands against it.

Nothing is written down about each revision, since a list would go stale: the downgrade is made in a transaction, what is
missing then is what it drops, and the transaction is rolled back unless it was asked to commit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import sqlalchemy

from queue_service.db import schema
from queue_service.db.migration import Migration, Tell, changed
from queue_service.db.revision import HEAD
from queue_service.errors import ConfigError

# Rows of a table are counted up to here.
COUNTED = 100_000

# A partition comes and goes by itself, with the table that it belongs to.
_COLUMNS = """
select c.relname, a.attname, c.oid, a.attnum
  from pg_catalog.pg_class as c join pg_catalog.pg_attribute as a on a.attrelid = c.oid
 where c.relnamespace = to_regnamespace('queue_service') and c.relkind in ('r', 'p') and not c.relispartition
   and c.relname <> 'alembic_version' and a.attnum > 0 and not a.attisdropped
"""


class Column(NamedTuple):
    """With its numbers: one that is dropped and made again under its name has lost what it held."""

    table: str
    name: str
    table_id: int
    number: int


@dataclass(frozen=True, slots=True)
class Losses:
    """Tables that go, with their number of rows (up to COUNTED), and columns that go from tables which stay."""

    tables: dict[str, int]
    columns: Sequence[str]

    def lines(self) -> list[str]:
        """For people, one for each."""
        tables = [f"table {name} ({_counted(count, 'row')})" for name, count in self.tables.items()]
        return [*tables, *(f"column {name}" for name in self.columns)] or ["no table and no column"]


def downgrade(
    conninfo: str, to: str, *, lease: timedelta, force: bool, commit: bool, tell: Tell | None = None
) -> Losses:
    """What a downgrade to revision `to` drops; with `commit` it has dropped that.

    Raises ConfigError while turns are owed an ending, workers were seen within `lease`, or runs that are not over would be
    dropped, unless `force` says that all of this may be lost, and what `migration.changed` raises. Nothing has changed
    then. Tables are taken only once nothing stands against it, so that a question holds up nobody who is at work.
    """

    def change(migration: Migration) -> Losses:
        connection = migration.connection
        tables = {column.table for column in _columns(connection)}
        if not force:
            _refuse(_needs(connection, tables, lease))
        migration.exclude_others()
        # Nobody may arm a turn or enqueue a run between the look and the drop.
        migration.take_tables()
        before = _columns(connection)
        tables = {column.table for column in before}
        needs = _needs(connection, tables, lease)
        counts = {table: _count(connection, table) for table in tables}
        schema.downgrade(connection, to)
        losses = _compared(before, _columns(connection), counts)
        if runs := losses.tables.get("runs"):
            needs.append(f"{_counted(runs, 'run')} queued or running, which would be lost")
        if not force:
            _refuse(needs)
        return losses

    return changed(conninfo, change, tell=tell, commit=commit)


def is_older(have: str | None, to: str) -> bool:
    """Whether `to` is a revision before the one the database has."""
    return have is not None and (to == "base" or (to != "head" and to < have <= HEAD))


def _refuse(needs: Sequence[str]) -> None:
    if needs:
        raise ConfigError(
            f"The database is in use: {'; '.join(needs)}. Stop the workers and wait for the turns to end, or say --force "
            "to drop it all the same. Nothing was changed."
        )


def _needs(connection: sqlalchemy.Connection, tables: Collection[str], lease: timedelta) -> list[str]:
    """What stands against dropping anything, as clauses."""
    found = []
    if "turn_markers" in tables and (owed := _count(connection, "turn_markers")):
        found.append(f"{_counted(owed, 'turn')} owed an ending")
    if "workers" in tables:
        seen = "select count(*) from queue_service.workers where seen_at > clock_timestamp() - %(lease)s::interval"
        live = connection.exec_driver_sql(seen, {"lease": lease}).scalar_one()
        if live:
            found.append(f"{_counted(live, 'worker')} at work")
    return found


def _columns(connection: sqlalchemy.Connection) -> set[Column]:
    return {Column(*row) for row in connection.exec_driver_sql(_COLUMNS).all()}


def _count(connection: sqlalchemy.Connection, table: str) -> int:
    # The name comes from the catalogue, or from this module.
    rows = f'select count(*) from (select from queue_service."{table}" limit {COUNTED + 1}) as counted'  # noqa: S608
    count: int = connection.exec_driver_sql(rows).scalar_one()
    return count


def _compared(before: set[Column], after: set[Column], counts: Mapping[str, int]) -> Losses:
    stay = {column.table_id for column in after}
    gone = sorted({column.table for column in before if column.table_id not in stay})
    columns = sorted(f"{column.table}.{column.name}" for column in before - after if column.table_id in stay)
    return Losses({table: counts[table] for table in gone}, columns)


def _counted(count: int, what: str) -> str:
    if count > COUNTED:
        return f"more than {COUNTED:,} {what}s"
    return f"{count:,} {what if count == 1 else what + 's'}"
