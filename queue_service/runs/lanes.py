"""The operations, as values, that put right what lanes say of themselves."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from queue_service.db.query import Query, Rows
from queue_service.runs.sql import SQL


class Lane(NamedTuple):
    """The name of a lane. It equals its row."""

    queue: str
    ordering_key: str


def tend_lanes(queues: Sequence[str], tasks: Sequence[str], *, limit: int, owner: str | None = None) -> Query[int]:
    """Put right what lanes that claims by this owner look at say of themselves: how many were changed. Of each queue and
    task at most `limit` are looked at."""
    return SQL.query(
        "tend_lanes", lambda rows: rows[0][0] or 0, queues=list(queues), tasks=list(tasks), owner=owner, limit=limit
    )


def tend_after(lane: Lane, *, limit: int) -> Query[tuple[Lane, int] | None]:
    """As `tend_lanes`, the lanes after one. The last of them, and how many were changed; None where
    there are no more."""

    def decode(rows: Rows) -> tuple[Lane, int] | None:
        return (Lane(rows[0][0], rows[0][1]), rows[0][2]) if rows else None

    return SQL.query("tend_after", decode, after_queue=lane.queue, after_key=lane.ordering_key, limit=limit)


def make_lanes(lanes: Collection[Lane]) -> Query[list[Lane]]:
    """Those that did not exist."""
    queues, keys = [lane[0] for lane in lanes], [lane[1] for lane in lanes]
    return SQL.query("make_lanes", lambda rows: [Lane(*row) for row in rows], queues=queues, keys=keys)
