"""The operations on the roster, as values."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from hashlib import sha256
from typing import NamedTuple

from queue_service.codec import read_object
from queue_service.db.query import Query, Rows, column, nothing, scalar
from queue_service.db.revision import HEAD
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


class Fleet(NamedTuple):
    """The ids of the workers that share their work and live, and what time it is in the database, in seconds."""

    ids: list[int]
    time: float


def fleet_name(queues: Collection[str], tasks: Collection[str]) -> str:
    """The same for all that can take the same runs."""
    return sha256(json.dumps([sorted(queues), sorted(tasks)]).encode()).hexdigest()[:16]


def join(name: str, version: str, queues: str, fleet: str | None = None) -> Query[int]:
    """The id of this worker, new at each start. `queues` is JSON text. Without a fleet it shares its work with nobody."""
    return SQL.query("join", scalar, name=name, version=version, queues=queues, fleet=fleet, revision=HEAD)


def beat(worker_id: int, failing: Sequence[str] = (), *, silence: timedelta = timedelta(seconds=15)) -> Query[Fleet]:
    """Say that this worker lives, and which of its services are failing. The fleet is of those seen within `silence`."""
    return SQL.query("beat", lambda rows: Fleet(*rows[0]), worker_id=worker_id, failing=list(failing), silence=silence)


def leave(worker_id: int) -> Query[None]:
    return SQL.query("leave", nothing, worker_id=worker_id)


def listed(silence: timedelta) -> Query[list[WorkerRow]]:
    def decode(rows: Rows) -> list[WorkerRow]:
        return [WorkerRow(row[0], row[1], row[2], read_object(row[3]).value, *row[4:]) for row in rows]

    return SQL.query("listed", decode, silence=silence)


def prune(silence: timedelta) -> Query[list[int]]:
    return SQL.query("prune", column, silence=silence)
