"""The daily partitions of `finished_runs`: made ahead of time, dropped when all that is in them is past retention, and
where failed runs are kept longer, replaced by what failed.

Any number of processes may do this at once: an advisory lock lets one work and the others go on.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple, TypeVar

import psycopg
from psycopg import errors as pg
from psycopg import sql

from queue_service.db.execute import Connection, translated
from queue_service.db.meaning import meaning
from queue_service.db.pool import Pool
from queue_service.errors import DatabaseRefused
from queue_service.exceptions import message
from queue_service.logs import get_logger

T = TypeVar("T")

log = get_logger(__name__)

DAYS_AHEAD = 3
# Attaching locks the default partition against writers: better to give up after so many seconds than to stand in their way.
LOCK_WAIT = 1.0
_LOCK = 4_718_105_520_115
# One that holds nothing but what failed that day says so by its name.
_NAME = re.compile(r"finished_runs_(\d{8})(_failed)?")

# Names and bounds of partitions are the one place where SQL is composed: they come from dates, and DDL takes no
# parameters. What the default partition caught for that day moves along, or the new bounds would be refused.
_MAKE = """
create table {day} (like queue_service.finished_runs including defaults including constraints);
alter table {day} replica identity full;
with moved as (
    delete from queue_service.finished_runs_default where finished_at >= {lower} and finished_at < {upper} returning *
)
insert into {day} select * from moved;
alter table queue_service.finished_runs attach partition {day} for values from ({lower}) to ({upper});
"""

# No partition has a key. Where everything is published, Postgres lets rows be deleted only where it can say which.
_IDENTIFY = "alter table {} replica identity full"

# With its indexes, which would otherwise be built when it is attached, while everybody waits.
_COPY = """
create table {failed} (like queue_service.finished_runs including defaults including constraints including indexes);
alter table {failed} replica identity full;
insert into {failed} select * from {day} where state = 'failed';
"""

# What was retried or deleted since it was copied is gone from the day by the time of the lock. It is looked up run by
# run, in the index: no join, which might read the whole day while everybody waits.
_REPLACE = """
lock table queue_service.finished_runs in access exclusive mode;
delete from {failed} as kept where (select stored.id from {day} as stored where stored.id = kept.id limit 1) is null;
alter table queue_service.finished_runs detach partition {day};
drop table {day};
alter table queue_service.finished_runs attach partition {failed} for values from ({lower}) to ({upper});
"""


class Changed(NamedTuple):
    """The partitions that were made, and those that were dropped."""

    made: list[str]
    dropped: list[str]


class Part(NamedTuple):
    """A day's partition. A thin one has only what failed."""

    day: date
    thin: bool = False

    @property
    def name(self) -> str:
        return f"finished_runs_{self.day:%Y%m%d}{'_failed' if self.thin else ''}"


class Partitions:
    def __init__(self, pool: Pool, *, retention: timedelta, retention_failed: timedelta) -> None:
        self._pool = pool
        self._retention = retention
        self._retention_failed = max(retention, retention_failed)

    async def make_and_drop(self) -> Changed:
        """What was made and dropped; nothing where another process is at it or a table is busy. What the database refuses
        of it holds up nothing else, and is tried again in the next pass: what ends on a day that has no partition goes to
        the default one. It is raised at the end, as DatabaseRefused."""
        changed, refused = await self._alone(self._make_and_drop) or (Changed([], []), [])
        if any(changed):
            log.info("history partitions", made=changed.made, dropped=changed.dropped)
        if refused:
            raise refused[0]
        return changed

    async def thin(self) -> list[str]:
        """Replace days past retention by what failed in them, where that is kept longer. Returns the days' partitions."""
        thinned: list[str] = []
        while name := await self._alone(self._thin):
            log.info("of a day in history only what failed is left", partition=name)
            thinned.append(name)
        return thinned

    async def _alone(self, work: Callable[[Connection, date], Awaitable[T]]) -> T | None:
        """Do it in one transaction, given the day it is in the database; None, and nothing is done, where another process
        is at it or a table is busy."""
        async with self._pool.connection() as conn:
            with translated():
                try:
                    async with conn.transaction():
                        return await self._locked(conn, work)
                except pg.LockNotAvailable:
                    log.info("history is busy; its partitions wait for the next pass")
                    return None

    async def _locked(self, conn: Connection, work: Callable[[Connection, date], Awaitable[T]]) -> T | None:
        await conn.execute("select pg_catalog.set_config('lock_timeout', %s, true)", [f"{LOCK_WAIT:g}s"])
        # What failed in a day may be much to copy.
        await conn.execute("set local statement_timeout = '10min'")
        # Times are read in binary form: as text they follow the session's DateStyle.
        look = "select pg_catalog.pg_try_advisory_xact_lock(%s), pg_catalog.clock_timestamp()"
        cursor = await conn.execute(look, [_LOCK], binary=True)
        mine, now = await cursor.fetchone() or (False, datetime.now(UTC))
        return await work(conn, now.astimezone(UTC).date()) if mine else None

    async def _make_and_drop(self, conn: Connection, today: date) -> tuple[Changed, list[DatabaseRefused]]:
        have, unidentified = await _existing(conn), await _unidentified(conn)
        due = [Part(day) for day in sorted((_wanted(today) | await _stray(conn)) - {part.day for part in have})]
        old = self._old(have, today)
        if due or old or unidentified:
            # Attaching lets readers in, who were planned without the new partition, and who would look for what has just
            # moved there in vain.
            await conn.execute("lock table queue_service.finished_runs in access exclusive mode")
        refused: list[DatabaseRefused] = []
        for name in unidentified:
            table = sql.Identifier("queue_service", name)
            await _try(conn, "identify the rows of", name, sql.SQL(_IDENTIFY).format(table), refused)
        made = [part.name for part in due if await _try(conn, "make", part.name, _composed(_MAKE, part.day), refused)]
        drop = sql.SQL("drop table {}")
        dropped = [part.name for part in old if await _try(conn, "drop", part.name, drop.format(_table(part)), refused)]
        return Changed(made, dropped), refused

    async def _thin(self, conn: Connection, today: date) -> str | None:
        have = await _existing(conn)
        fat = [part for part in have if not part.thin and part.day < today - self._retention]
        if not fat or not _is_trusted(have, today) or self._retention_failed == self._retention:
            return None
        await conn.execute(_composed(_COPY, fat[0].day))
        await conn.execute(_composed(_REPLACE, fat[0].day))
        return fat[0].name

    def _old(self, have: Sequence[Part], today: date) -> list[Part]:
        gone = [part for part in have if part.day < today - self._retention_failed]
        return gone if _is_trusted(have, today) else []


async def _try(conn: Connection, what: str, name: str, statement: sql.Composed, refused: list[DatabaseRefused]) -> bool:
    """False, and nothing is done, where the database refuses it: then the reason is added to `refused`."""
    try:
        async with conn.transaction():
            await conn.execute(statement)
    except (pg.LockNotAvailable, pg.QueryCanceled):
        raise
    except psycopg.Error as error:
        if conn.closed:
            raise
        said = meaning(error) or message(error).partition("\n")[0]
        hint = ""
        if isinstance(error, pg.DuplicateTable):
            hint = " A table of that name is there, and is no partition of finished_runs: attach it, or rename it."
        refused.append(DatabaseRefused(f"History cannot {what} queue_service.{name}: {said}{hint}"))
        refused[-1].__cause__ = error
        return False
    return True


async def _unidentified(conn: Connection) -> list[str]:
    """Partitions of which nobody could say which row was deleted."""
    cursor = await conn.execute(
        "select relname from pg_catalog.pg_class where relkind = 'r' and relreplident = 'd' and oid in (select inhrelid"
        " from pg_catalog.pg_inherits where inhparent = 'queue_service.finished_runs'::regclass) order by relname"
    )
    return [row[0] for row in await cursor.fetchall()]


def _wanted(today: date) -> set[date]:
    return {today + timedelta(days=offset) for offset in range(DAYS_AHEAD + 1)}


def _is_trusted(have: Sequence[Part], today: date) -> bool:
    """Whether it was yesterday here already. A clock that has jumped ahead would have all of history dropped."""
    return today - timedelta(days=1) in {part.day for part in have}


async def _existing(conn: Connection) -> list[Part]:
    """By day. The default partition is not among them."""
    cursor = await conn.execute(
        "select relname from pg_catalog.pg_class where oid in (select inhrelid from pg_catalog.pg_inherits"
        " where inhparent = 'queue_service.finished_runs'::regclass)"
    )
    names = [match for row in await cursor.fetchall() if (match := _NAME.fullmatch(row[0]))]
    return sorted(
        Part(datetime.strptime(name[1], "%Y%m%d").replace(tzinfo=UTC).date(), bool(name[2])) for name in names
    )


async def _stray(conn: Connection) -> set[date]:
    """The days of what is in the default partition, since there was none of its own. It would never be dropped there."""
    cursor = await conn.execute(
        "select distinct (finished_at at time zone 'UTC')::date from queue_service.finished_runs_default", binary=True
    )
    return {row[0] for row in await cursor.fetchall()}


def _table(part: Part) -> sql.Identifier:
    return sql.Identifier("queue_service", part.name)


def _composed(text: str, day: date) -> sql.Composed:
    lower = datetime(day.year, day.month, day.day, tzinfo=UTC)
    return sql.SQL(text).format(
        day=_table(Part(day)),
        failed=_table(Part(day, thin=True)),
        lower=sql.Literal(lower),
        upper=sql.Literal(lower + timedelta(days=1)),
    )
