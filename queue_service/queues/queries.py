"""The operations on queues, as values."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

from queue_service.db.query import Query, Rows, found, scalar
from queue_service.db.statements import Statements

SQL = Statements("queue_service.queues")


class Queue(NamedTuple):
    name: str
    paused_at: datetime | None
    resumes_at: datetime | None
    max_running: int | None
    max_running_per_key: int | None
    rate: int | None
    period: timedelta | None
    burst: int | None


class QueueLimits(NamedTuple):
    """None is no limit; of the last three, all are set, or none."""

    max_running: int | None
    max_running_per_key: int | None
    rate: int | None
    period: timedelta | None
    burst: int | None


def pause(name: str, *, until: datetime | None = None, lasting: timedelta | None = None) -> Query[bool | None]:
    """False if it was paused already, and until the same time; None if that time has passed, and nothing was changed."""
    return SQL.query("pause", scalar, name=name, until=until, lasting=lasting)


def resume(name: str) -> Query[bool]:
    """False if it was not paused."""
    return SQL.query("resume", found, name=name)


def await_claims() -> Query[None]:
    """In a transaction: waits for the claims that are under way, and lets none begin until it ends."""
    return SQL.query("await_claims", _nothing)


def count_all() -> Query[None]:
    return SQL.query("count_all", _nothing)


def limit(name: str, limits: QueueLimits) -> Query[bool]:
    """False if it had these limits already."""
    return SQL.query("limit", found, name=name, **limits._asdict())


def widen(queue: str, width: int, *, limit: int) -> Query[bool]:
    """Change at most so many lanes. True: there are more, or some that others hold at this moment."""
    return SQL.query("widen", scalar, queue=queue, width=width, limit=limit)


def listed() -> Query[list[Queue]]:
    def decode(rows: Rows) -> list[Queue]:
        return [Queue(*row) for row in rows]

    return SQL.query("listed", decode)


def _nothing(_rows: Rows) -> None:
    return None
