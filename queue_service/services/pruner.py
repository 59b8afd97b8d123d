"""Makes the daily partitions of `finished_runs` ahead of time and drops those past retention; forgets turns that ended,
events, silent workers and connections long lapsed.

Any number of processes may do this at once: an advisory lock lets one work and the others go on.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple

from psycopg import errors as pg
from psycopg import sql

from queue_service.connections import queries as connections
from queue_service.db.execute import translated
from queue_service.db.pool import Connection, Pool
from queue_service.events import queries as events
from queue_service.logs import get_logger
from queue_service.roster import queries as roster
from queue_service.turns import queries as turns

log = get_logger(__name__)

AHEAD = 3
BATCH = 5_000
STREAMS = 500
TURNS = 500
SILENCE = timedelta(days=1)
_LOCK = 4_718_105_520_115
_PREFIX = "finished_runs_"

# Names and bounds of partitions are the one place where SQL is composed: they come from dates, and DDL takes no
# parameters. What the default partition caught for that day moves along, or the new bounds would be refused.
_MAKE = """
create table queue_service.{name} (like queue_service.finished_runs including defaults including constraints);
with moved as (
    delete from queue_service.finished_runs_default where finished_at >= {lower} and finished_at < {upper} returning *
)
insert into queue_service.{name} select * from moved;
alter table queue_service.finished_runs attach partition queue_service.{name} for values from ({lower}) to ({upper});
"""


class Pruned(NamedTuple):
    """Partitions made and dropped; turns and events forgotten."""

    made: list[str]
    dropped: list[str]
    turns: int = 0
    events: int = 0


class Pruner:
    def __init__(self, pool: Pool, *, retention: timedelta) -> None:
        self._pool = pool
        self._retention = retention

    async def once(self) -> Pruned:
        """Partitions first, for which there is a time; what is old can wait, and there may be much of it."""
        pruned = await self.partitions()
        await self._pool.fetch(roster.prune(SILENCE))
        await self._pool.fetch(connections.prune(SILENCE))
        return pruned._replace(turns=await self._turns(), events=await self._events())

    async def partitions(self) -> Pruned:
        """What was made and dropped; nothing where another process holds the lock or a table is busy."""
        async with self._pool.connection() as conn:
            with translated():
                return await self._partitions(conn)

    async def _turns(self) -> int:
        """Forget turns, batch after batch, each a short transaction."""
        count = 0
        while gone := await self._pool.fetch(turns.prune(self._retention, limit=TURNS)):
            count += gone
        if count:
            log.info("forgot turns that ended long ago", count=count)
        return count

    async def _events(self) -> int:
        """Trim stream after stream. What was trimmed before has few events left in front of the first fresh one."""
        count, at = 0, ""
        while streams := await self._pool.fetch(events.aged(self._retention, after=at, limit=STREAMS)):
            for stream, upto in streams:
                while upto is not None and (
                    gone := await self._pool.fetch(events.trim(stream, upto=upto, limit=BATCH))
                ):
                    count += gone
            at = streams[-1][0]
        if count:
            log.info("deleted old events", count=count)
        return count

    async def _partitions(self, conn: Connection) -> Pruned:
        try:
            async with conn.transaction():
                # Attaching locks the default partition against writers: better to give up than to stand in their way.
                await conn.execute("set local lock_timeout = '1s'")
                cursor = await conn.execute("select pg_try_advisory_xact_lock(%s), clock_timestamp()", [_LOCK])
                mine, now = await cursor.fetchone() or (False, datetime.now(UTC))
                if not mine:
                    return Pruned([], [])
                due, old = self._outstanding(now.astimezone(UTC).date(), await _existing(conn))
                if due or old:
                    # Attaching lets readers in, who were planned without the new partition, and who would look for what
                    # has just moved there in vain.
                    await conn.execute("lock table queue_service.finished_runs in access exclusive mode")
                for day in due:
                    await conn.execute(_make(day))
                for day in old:
                    await conn.execute(sql.SQL("drop table queue_service.{}").format(sql.Identifier(_name(day))))
        except pg.LockNotAvailable:
            log.info("history is busy; its partitions wait for the next pass")
            return Pruned([], [])
        pruned = Pruned([_name(day) for day in due], [_name(day) for day in old])
        if due or old:
            log.info("history partitions", made=pruned.made, dropped=pruned.dropped)
        return pruned

    def _outstanding(self, today: date, have: set[date]) -> tuple[list[date], list[date]]:
        """The days that need a partition, and those whose partition is past retention."""
        wanted = {today + timedelta(days=offset) for offset in range(AHEAD + 1)}
        return sorted(wanted - have), sorted(day for day in have if day < today - self._retention)


async def _existing(conn: Connection) -> set[date]:
    cursor = await conn.execute(
        "select relname from pg_class where oid in (select inhrelid from pg_inherits"
        " where inhparent = 'queue_service.finished_runs'::regclass)"
    )
    names = [row[0].removeprefix(_PREFIX) for row in await cursor.fetchall()]
    return {datetime.strptime(name, "%Y%m%d").replace(tzinfo=UTC).date() for name in names if name.isdigit()}


def _name(day: date) -> str:
    return f"{_PREFIX}{day:%Y%m%d}"


def _make(day: date) -> sql.Composed:
    lower = datetime(day.year, day.month, day.day, tzinfo=UTC)
    return sql.SQL(_MAKE).format(
        name=sql.Identifier(_name(day)), lower=sql.Literal(lower), upper=sql.Literal(lower + timedelta(days=1))
    )
