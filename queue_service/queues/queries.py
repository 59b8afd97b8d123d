"""The operations on queues, as values."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

from queue_service.db.query import Query, Rows, found
from queue_service.db.statements import Statements

SQL = Statements("queue_service.queues")


class Queue(NamedTuple):
    name: str
    paused_at: datetime | None
    resumes_at: datetime | None


def pause(name: str, *, until: datetime | None = None, lasting: timedelta | None = None) -> Query[bool]:
    """False if it was paused already, and until the same time."""
    return SQL.query("pause", found, name=name, until=until, lasting=lasting)


def resume(name: str) -> Query[bool]:
    """False if it was not paused."""
    return SQL.query("resume", found, name=name)


def listed() -> Query[list[Queue]]:
    def decode(rows: Rows) -> list[Queue]:
        return [Queue(*row) for row in rows]

    return SQL.query("listed", decode)
