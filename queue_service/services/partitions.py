"""The daily partitions of `finished_runs`: made ahead of time, dropped when all that is in them is past retention, and
where failed runs are kept longer, replaced by what failed.

They belong to the owner of that table, whoever makes them: it is done in the owner's name, by a role that may take it. One
that may not leaves it to others, says so once, and works on: what ends on a day without a partition is in the default one.

Any number of processes may do this at once: an advisory lock lets one work and the others go on.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple, TypeVar

import psycopg
from psycopg import errors as pg
from psycopg import sql

from queue_service.db.execute import Connection, translated
from queue_service.db.meaning import meaning
from queue_service.db.owner import MAY_BE_OWNER
from queue_service.db.pool import Pool
from queue_service.errors import DatabaseRefused
from queue_service.exceptions import message
from queue_service.logs import get_logger

T = TypeVar("T")

log = get_logger(__name__)

DAYS_AHEAD = 3
# As `db migrate` does, which may be all that the owner ever starts.
DAYS_AHEAD_BY_HAND = 7
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
select queue_service.inherit_policies({name}::regclass);
alter table queue_service.finished_runs attach partition {day} for values from ({lower}) to ({upper});
"""

# No partition has a key. Where everything is published, Postgres lets rows be deleted only where it can say which.
_IDENTIFY = "alter table {} replica identity full"

# With its indexes, which would otherwise be built when it is attached, while everybody waits.
_COPY = """
create table {failed} (like queue_service.finished_runs including defaults including constraints including indexes);
alter table {failed} replica identity full;
insert into {failed} select * from {day} where state = 'failed';
select queue_service.inherit_policies({failed_name}::regclass);
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


# Whose history is, whether we may act as its owner, and which partitions are ours to hand over.
_LOOK = f"""
with this as (
    select owner.oid, owner.rolname::text, {MAY_BE_OWNER} as may_be_owner
      from pg_catalog.pg_class as history join pg_catalog.pg_roles as owner on owner.oid = history.relowner
     where history.oid = 'queue_service.finished_runs'::regclass
)
select this.rolname, current_user::text, this.may_be_owner, array(
    select part.relname::text from pg_catalog.pg_class as part
      join pg_catalog.pg_inherits on inhrelid = part.oid and inhparent = 'queue_service.finished_runs'::regclass
     where part.relowner <> this.oid and pg_catalog.pg_has_role(part.relowner, 'USAGE') order by part.relname)
  from this
"""  # noqa: S608 - constants


class Standing(NamedTuple):
    """Who owns history, who we are, whether we may act as the owner, and the partitions that we own instead."""

    owner: str
    user: str
    may_be_owner: bool
    ours: list[str]


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
        self._said = False

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

    async def make(self, days: int) -> list[str]:
        """Make those of so many days to come, and drop none. Returns what was made. Raises DatabaseRefused in the end."""
        made: list[str] = []
        refused: list[DatabaseRefused] = []

        async def make(conn: Connection, today: date) -> None:
            missing = _wanted(today, days) - {part.day for part in await _existing(conn)}
            if missing:
                await conn.execute("lock table queue_service.finished_runs in access exclusive mode")
            made.extend(await _made(conn, missing, refused))

        await self._alone(make)
        if refused:
            raise refused[0]
        return made

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
        if not mine:
            return None
        cursor = await conn.execute(_LOOK, binary=True)
        standing = Standing(*(await cursor.fetchone() or ()))
        today = now.astimezone(UTC).date()
        if not standing.may_be_owner:
            await self._leave_to_owner(conn, today, standing)
            return None
        await _hand_over(conn, standing)
        await conn.execute("select pg_catalog.set_config('role', %s, true)", [standing.owner])
        return await work(conn, today)

    async def _leave_to_owner(self, conn: Connection, today: date, standing: Standing) -> None:
        have = await _existing(conn)
        missing = sorted(_wanted(today) - {part.day for part in have})
        old = self._old(have, today)
        if (missing or old) and not self._said:
            self._said = True
            log.warning(
                "this role may not make or drop the daily partitions of history: what ends on a day without one is kept in "
                "finished_runs_default, and what is old is not dropped. Run `queue-service db migrate` each day as the "
                "owner, which makes them; or let one worker connect as the owner, or as a member of it, which does both",
                role=standing.user, owner=standing.owner, missing=[Part(day).name for day in missing],
                old=[part.name for part in old],
            )  # fmt: skip

    async def _make_and_drop(self, conn: Connection, today: date) -> tuple[Changed, list[DatabaseRefused]]:
        have, unidentified = await _existing(conn), await _unidentified(conn)
        due = (_wanted(today) | await _stray(conn)) - {part.day for part in have}
        old = self._old(have, today)
        if due or old or unidentified:
            # Attaching lets readers in, who were planned without the new partition, and who would look for what has just
            # moved there in vain.
            await conn.execute("lock table queue_service.finished_runs in access exclusive mode")
        refused: list[DatabaseRefused] = []
        for name in unidentified:
            table = sql.Identifier("queue_service", name)
            await _try(conn, "identify the rows of", name, sql.SQL(_IDENTIFY).format(table), refused)
        made = await _made(conn, due, refused)
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


async def _made(conn: Connection, days: Collection[date], refused: list[DatabaseRefused]) -> list[str]:
    parts = [Part(day) for day in sorted(days)]
    return [part.name for part in parts if await _try(conn, "make", part.name, _composed(_MAKE, part.day), refused)]


async def _hand_over(conn: Connection, standing: Standing) -> None:
    """Give the owner what this role made in its own name: a version before this one did, and so does a person."""
    refused: list[DatabaseRefused] = []
    for name in standing.ours:
        give = sql.SQL("alter table {} owner to {}").format(
            sql.Identifier("queue_service", name), sql.Identifier(standing.owner)
        )
        if await _try(conn, "hand over", name, give, refused):
            log.info("a partition of history belongs to the owner of history now", partition=name, owner=standing.owner)
    for each in refused:
        log.warning("a partition of history is not its owner's", why=message(each))


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
        elif isinstance(error, pg.InsufficientPrivilege):
            hint = " `queue-service db grants --role owner OWNER` prints how all of the schema comes to belong to one role."
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


def _wanted(today: date, days: int = DAYS_AHEAD) -> set[date]:
    return {today + timedelta(days=offset) for offset in range(days + 1)}


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
        name=sql.Literal(_table(Part(day)).as_string(None)),
        failed_name=sql.Literal(_table(Part(day, thin=True)).as_string(None)),
    )
