"""The operations on steps, as values: one function per statement of `statements.sql`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from operator import attrgetter
from typing import NamedTuple

import msgspec

from queue_service import codec
from queue_service.db.query import Query, Row, Rows, found, nothing
from queue_service.db.rows import flaw_of
from queue_service.db.statements import Statements
from queue_service.steps.model import NewStep, Step

SQL = Statements("queue_service.steps")

# A step as (run id, attempt, name).
Key = tuple[int, int, str]


def store(steps: Sequence[NewStep]) -> Query[dict[Key, bool]]:
    """True for those that are stored, False for those whose run another session has locked. The missing ones were lost."""
    return SQL.query(
        "store",
        lambda rows: {(run_id, attempt, name): is_stored for run_id, attempt, name, is_stored in rows},
        steps="[" + ",".join(map(_json, steps)) + "]",
    )


def of_run(run_id: int) -> Query[list[Step]]:
    """In the order in which they were stored."""
    return SQL.query(
        "of_run", lambda rows: sorted(map(_step, rows), key=attrgetter("created_at", "name")), run_id=run_id
    )


def is_stored(step: NewStep) -> Query[bool]:
    """Whether this very attempt has stored it."""
    return SQL.query("is_stored", found, run_id=step.run_id, name=step.name, attempt=step.attempt)


def forget(run_id: int) -> Query[None]:
    return SQL.query("forget", nothing, run_id=run_id)


class Place(NamedTuple):
    """Where a walk along the steps by time has come to: `at` is a time as the database writes it, None the beginning."""

    at: str | None = None
    run_id: int = 0


class Forgotten(NamedTuple):
    """How many steps went, and where to go on; None where there is nothing left to be looked at."""

    steps: int
    following: Place | None


def prune(age: timedelta, after: Place, *, scan_limit: int) -> Query[Forgotten]:
    def decode(rows: Rows) -> Forgotten:
        count, at, run_id = rows[0]
        return Forgotten(count, None if at is None else Place(at, run_id))

    return SQL.query("prune", decode, age=age, after=after.at, after_run=after.run_id, scan_limit=scan_limit)


def _json(step: NewStep) -> str:
    name = msgspec.json.encode(step.name).decode()
    return f'{{"run_id":{step.run_id},"attempt":{step.attempt},"name":{name},"result":{step.result}}}'


def _step(row: Row) -> Step:
    name, attempt, created_at, text = row
    result, flaw = codec.read(text)
    return Step(name=name, attempt=attempt, created_at=created_at, result=result, unreadable=flaw or flaw_of(row))
