"""The operations, as values, for what was claimed by a worker that is lost, or does not know of it: lease by lease and run
by run, where a sweep cannot take many at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from queue_service.db.query import Query, Rows, array_literal, column
from queue_service.runs.lanes import Lane
from queue_service.runs.queries import SweptRun, read_swept
from queue_service.runs.sql import SQL


def release_unheard(worker_id: int, *, known: Collection[int]) -> Query[list[int]]:
    """The runs that went back: those under leases of this worker that it does not know."""
    return SQL.query("release_unheard", column, worker_id=worker_id, known=array_literal(sorted(known)))


def sweep_lease(lease_id: int, *, max_losses: int) -> Query[list[SweptRun]]:
    """As `sweep`, of one lease, if it has lapsed."""
    return SQL.query("sweep_lease", read_swept, lease_id=lease_id, max_losses=max_losses)


def sweep_run(lease_id: int, run_id: int, *, max_losses: int) -> Query[list[SweptRun]]:
    """As `sweep`, of one run of a lease, if that has lapsed."""
    return SQL.query("sweep_run", read_swept, lease_id=lease_id, run_id=run_id, max_losses=max_losses)


def lapsed(*, limit: int) -> Query[list[tuple[int, list[int]]]]:
    """Leases that have lapsed, with the ids of what they held."""
    return SQL.query("lapsed", lambda rows: [(row[0], row[1]) for row in rows], limit=limit)


class Orphans(NamedTuple):
    """The last run that was looked at, None where there was none; those that run under a lease that does not exist; and the
    lanes, as queue and key, that have runs but no row."""

    looked_at: int | None
    run_ids: list[int]
    laneless: list[Lane]


def orphans(*, after: int, scan_limit: int) -> Query[Orphans]:
    def decode(rows: Rows) -> Orphans:
        looked_at, run_ids, queues, keys = rows[0]
        return Orphans(looked_at, run_ids, [Lane(*each) for each in zip(queues, keys, strict=True)])

    return SQL.query("orphans", decode, after=after, scan_limit=scan_limit)


def sweep_orphans(
    run_ids: Collection[int], *, max_losses: int, final_tasks: Sequence[str] = ()
) -> Query[list[SweptRun]]:
    """As `sweep`, of such runs. `final_tasks` are not begun twice, as far as is known: their lease said so."""
    return SQL.query(
        "sweep_orphans",
        read_swept,
        ids=array_literal(sorted(run_ids)),
        max_losses=max_losses,
        final_tasks=list(final_tasks) or None,
    )
