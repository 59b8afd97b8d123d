"""The operations on the roster, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from queue_service.codec import read_object
from queue_service.db.query import Query, Rows, column, nothing, scalar
from queue_service.db.statements import Statements

SQL = Statements("queue_service.roster")


class WorkerRow(NamedTuple):
    """`queues` maps a queue to its concurrency; `holds` counts the runs under its leases; `failing` are those of its
    services that are failing, as it said last."""

    id: int
    name: str
    version: str
    queues: Mapping[str, int]
    started_at: datetime
    seen_at: datetime
    holds: int
    is_alive: bool
    failing: list[str]


def join(name: str, version: str, queues: str) -> Query[int]:
    """The id of this worker, new at each start. `queues` is JSON text."""
    return SQL.query("join", scalar, name=name, version=version, queues=queues)


def beat(worker_id: int, failing: Sequence[str] = ()) -> Query[None]:
    """Say that this worker lives, and which of its services are failing."""
    return SQL.query("beat", nothing, worker_id=worker_id, failing=list(failing))


def leave(worker_id: int) -> Query[None]:
    return SQL.query("leave", nothing, worker_id=worker_id)


def listed(silence: timedelta) -> Query[list[WorkerRow]]:
    def decode(rows: Rows) -> list[WorkerRow]:
        return [WorkerRow(row[0], row[1], row[2], read_object(row[3]).value, *row[4:]) for row in rows]

    return SQL.query("listed", decode, silence=silence)


def prune(silence: timedelta) -> Query[list[int]]:
    return SQL.query("prune", column, silence=silence)
