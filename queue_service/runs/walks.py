"""The operations on runs that look at many, as values: pages of a listing, and retries by a filter. Each looks at a bounded
number of runs, however few of them fit, and says where to go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from queue_service.db.channels import RUNS, Notice
from queue_service.db.query import Query, Rows
from queue_service.runs.model import Run, RunState
from queue_service.runs.rows import read_runs
from queue_service.runs.sql import SQL

# Runs that one statement looks at. They lie apart in the table: a quarter of a second where nothing of it is in memory.
SCAN_LIMIT = 5_000


class Page(NamedTuple):
    """Runs by descending id, and below which id there may be more; None: there are none. There may be more where the page
    is short, and even empty: so few of those that were looked at did fit."""

    runs: list[Run]
    below: int | None


def page(
    *,
    before: int | None = None,
    state: RunState | None = None,
    queue: str | None = None,
    task: str | None = None,
    limit: int = 50,
    scan_limit: int = SCAN_LIMIT,
) -> Query[Page]:
    """The newest runs below the id `before`, of a state, a queue and a task where these are given: at most `limit` that fit
    among the next `scan_limit`."""

    def decode(rows: Rows) -> Page:
        stopped = len(rows) == limit or (rows and rows[-1][-1])
        return Page(read_runs([row for row in rows if row[-2]]), rows[-1][0] if stopped else None)

    return SQL.query(
        "page",
        decode,
        before=before or 2**63 - 1,
        state=state and state.value,
        queue=queue,
        task=task,
        limit=limit,
        scan_limit=scan_limit,
        live=state in {None, RunState.QUEUED},
        running=state is RunState.RUNNING,
        finished=state in {None, RunState.SUCCEEDED},
        unsuccessful=state in {RunState.FAILED, RunState.CANCELLED, RunState.EXPIRED},
    )


@dataclass(frozen=True, slots=True)
class Filter:
    """Runs that ended like this; and of a queue, of a task, since a time or within so long, where that is given."""

    state: RunState
    queue: str | None = None
    task: str | None = None
    since: datetime | None = None
    within: timedelta | None = None


class Batch(NamedTuple):
    """What one statement has found, and how much of that it moved. `until` and `after` are for the next one; after the
    last there is no `after`."""

    until: datetime
    after: int | None
    found: int
    moved: int = 0
    notices: Sequence[Notice] = ()


class Place(NamedTuple):
    """Where a walk has come to: `until` is when it began, so that it chases nothing that ends meanwhile."""

    until: datetime | None = None
    after: int = 0


def retry_many(chosen: Filter, place: Place, *, limit: int) -> Query[Batch]:
    def decode(rows: Rows) -> Batch:
        until, after, found, moved, payloads = rows[0]
        return Batch(until, after, found, moved, [Notice(RUNS, payload) for payload in payloads])

    return SQL.query("retry_many", decode, **_asked(chosen, place, limit))


def count_many(chosen: Filter, place: Place, *, limit: int) -> Query[Batch]:
    return SQL.query("count_many", lambda rows: Batch(*rows[0]), **_asked(chosen, place, limit))


def _asked(chosen: Filter, place: Place, limit: int) -> dict[str, Any]:
    return {**asdict(chosen), "state": chosen.state.value, **place._asdict(), "limit": limit, "scan_limit": SCAN_LIMIT}
