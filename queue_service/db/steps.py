"""Several statements in a row, described once and run by anybody: our pool or the caller's connection, async or blocking.

Steps are a generator: it yields what it wants from the database, is sent the answer, and returns the result.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from queue_service.db.borrowed import AsyncBorrowed, AsyncFetching, SyncBorrowed
from queue_service.db.query import Query

T = TypeVar("T")

# Another session that changes what was looked at, before the write, makes us look again; this often is no coincidence.
MAX_TRIES = 20


@dataclass(frozen=True, slots=True)
class Copy:
    """Rows in COPY's text format, for `statement`."""

    statement: str
    data: str


Step = Query[Any] | Copy
Steps = Generator[Step, Any, T]


async def drive(steps: Steps[T], conn: AsyncFetching) -> T:
    """What the steps return, run on an asynchronous connection."""
    try:
        step = next(steps)
        while True:
            answer = await (conn.copy(step.statement, step.data) if isinstance(step, Copy) else conn.fetch(step))
            step = steps.send(answer)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


def drive_sync(steps: Steps[T], conn: SyncBorrowed) -> T:
    """As `drive`, on a blocking connection."""
    try:
        step = next(steps)
        while True:
            if isinstance(step, Copy):
                conn.copy(step.statement, step.data)
                step = steps.send(None)
            else:
                step = steps.send(conn.fetch(step))
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


async def drive_any(steps: Steps[T], conn: AsyncFetching | SyncBorrowed) -> T:
    """As `drive`, on a connection of either kind. On a blocking one nothing is awaited."""
    return await drive(steps, conn) if conn.is_async else drive_sync(steps, conn)


async def can_copy(conn: AsyncBorrowed | SyncBorrowed) -> bool:
    """Whether `Copy` is a step that this connection can take now."""
    return await conn.can_copy() if conn.is_async else conn.can_copy()


async def fetch_any(query: Query[T], conn: AsyncFetching | SyncBorrowed) -> T:
    """One query on a connection of either kind. On a blocking one nothing is awaited."""
    return await conn.fetch(query) if conn.is_async else conn.fetch(query)
