"""The operations on schedules, as values: one function per statement of `statements.sql`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import msgspec

from queue_service.codec import read_object
from queue_service.db.query import Query, Row, Rows, found, scalar
from queue_service.db.statements import Statements
from queue_service.schedules.model import DueSchedule, Firing, Misfire, NewSchedule, Schedule

SQL = Statements("queue_service.schedules")

# Before every slot: a look at what is due starts here.
START = (datetime(1900, 1, 1, tzinfo=UTC), "")


class Look(NamedTuple):
    """What is due at `now`, by the database's clock, and when the first of the others will be."""

    now: datetime
    later: datetime | None
    due: list[DueSchedule]


class Fired(NamedTuple):
    """A run that was stored for a slot; a schedule that moved without one has neither."""

    name: str
    queue: str
    priority: int
    slot: datetime | None
    run_id: int | None


def clock() -> Query[datetime]:
    return SQL.query("clock", scalar)


def put(new: NewSchedule, next_at: datetime) -> Query[bool | None]:
    """True: it is new; False: it was changed; None: it was like this already. `next_at` is for a recurrence that is new."""
    fields = {name: getattr(new, name) for name in NewSchedule.__slots__ if name != "recurrence"}
    recurrence = new.recurrence
    return SQL.query(
        "put",
        scalar,
        **fields,
        cron=recurrence.cron,
        every=recurrence.every,
        timezone=recurrence.timezone,
        next_at=next_at,
    )


def pause(name: str) -> Query[bool | None]:
    """False: it was paused already; None: there is no such schedule."""
    return SQL.query("pause", scalar, name=name)


def resume(schedule: Schedule, next_at: datetime) -> Query[bool]:
    """False: it is not paused, or was changed since it was read."""
    return SQL.query("resume", found, name=schedule.name, updated_at=schedule.updated_at, next_at=next_at)


def delete(name: str) -> Query[bool]:
    """False: there was no such schedule."""
    return SQL.query("delete", found, name=name)


def get(name: str) -> Query[Schedule | None]:
    return SQL.query("get", lambda rows: _schedule(rows[0]) if rows else None, name=name)


def listed() -> Query[list[Schedule]]:
    return SQL.query("listed", lambda rows: [_schedule(row) for row in rows])


def run_now(name: str) -> Query[tuple[int, str, int] | None]:
    """The run's id, queue and priority; None: there is no such schedule."""

    def decode(rows: Rows) -> tuple[int, str, int] | None:
        return (rows[0][0], rows[0][1], rows[0][2]) if rows else None

    return SQL.query("run_now", decode, name=name)


def due(*, after: tuple[datetime, str] = START, limit: int) -> Query[Look]:
    """`after` is the `next_at` and the name of the last one that was seen."""

    def decode(rows: Rows) -> Look:
        now, later = rows[0][:2]
        found = [
            DueSchedule(name, cron, every, timezone, Misfire(misfire), next_at, updated_at)
            for _, _, name, cron, every, timezone, misfire, next_at, updated_at in rows
            if name is not None
        ]
        return Look(now, later, found)

    return SQL.query("due", decode, after=after[0], after_name=after[1], limit=limit)


def fire(firings: Sequence[Firing], *, retention: timedelta) -> Query[list[Fired]]:
    """The schedules that moved by this, with their runs. One that is missing was fired or changed by somebody else."""

    def decode(rows: Rows) -> list[Fired]:
        return [Fired(*row) for row in rows]

    asked = [
        {
            "name": each.due.name,
            "seen": each.due.next_at,
            "updated_at": each.due.updated_at,
            "next_at": each.next_at,
            "slots": each.slots,
        }
        for each in firings
    ]
    return SQL.query("fire", decode, firings=msgspec.json.encode(asked).decode(), retention=retention)


def _schedule(row: Row) -> Schedule:
    return Schedule(
        name=row[0], task=row[1], queue=row[2], payload=read_object(row[3]).value, priority=row[4], expires_in=row[5],
        cron=row[6], every=row[7], timezone=row[8], misfire=Misfire(row[9]), next_at=row[10], paused_at=row[11],
        created_at=row[12], updated_at=row[13], last_slot=row[14], last_run_id=row[15],
        turn=None if row[16] is None else read_object(row[16]).value,
    )  # fmt: skip
