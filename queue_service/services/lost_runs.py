"""Takes over the runs of lost workers: those under leases that have lapsed, and those whose lease does not exist any more.

Leases are taken many at a time. Where that is refused, each is taken by itself, and where one is refused, each of its runs:
what cannot be taken is logged, and holds up nothing else. What a transaction of somebody's has locked is left until that
ends.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

from psycopg import errors as pg

from queue_service.db.execute import REFUSED
from queue_service.db.meaning import is_about_a_row, is_outage
from queue_service.db.query import Fetch, Query
from queue_service.errors import DatabaseUnavailable
from queue_service.logs import get_logger
from queue_service.runs import lanes, lost, queries
from queue_service.runs.queries import SweptRun
from queue_service.services.refusals import Refusals

log = get_logger(__name__)

# Leases hold up to some four thousand runs each; the statement must stay well inside its deadline.
LEASE_LIMIT = 5
# Lapsed leases among which the ones that cannot be taken are looked for.
BUSY_LIMIT = 100
# Runs that a look for orphans reads. There may be millions, and they are looked at in turn.
SCAN_LIMIT = 2_000
# Seconds until a lease that was refused is tried again.
AGAIN = 60.0


class LostRuns:
    """`final_tasks` are not begun twice."""

    def __init__(self, fetch: Fetch, *, max_losses: int, final_tasks: Collection[str] = ()) -> None:
        self._fetch = fetch
        self._max_losses = max_losses
        self._final_tasks = sorted(final_tasks)
        # Leases that another transaction keeps from being taken, as far as is known.
        self._busy: Collection[int] = ()
        self._leases: Refusals[int] = Refusals("a lease cannot be taken over as a whole; its runs are, one by one")
        self._runs: Refusals[int] = Refusals("a run of a lost worker cannot be taken over; it is tried again")
        self._retry_at = 0.0
        self._looked_at = 0

    async def begin(self) -> None:
        """Look again at what could not be taken before."""
        if self._busy:
            self._busy = await self._fetch(queries.busy_leases(limit=BUSY_LIMIT))

    async def take(self) -> list[SweptRun]:
        """Some of what has lapsed; [] where nothing is left that could be taken."""
        try:
            swept: list[SweptRun] = await self._take_many()
        except (DatabaseUnavailable, *REFUSED) as refused:
            if not is_about_a_row(refused):
                raise
            swept = await self._take_singly(await self._fetch(lost.lapsed(limit=BUSY_LIMIT)))
        if not swept and time.monotonic() >= self._retry_at and any(self._leases):
            self._retry_at = time.monotonic() + AGAIN
            lapsed = await self._fetch(lost.lapsed(limit=BUSY_LIMIT))
            known = {lease_id for lease_id, _ in lapsed}
            for gone in set(self._leases) - known:
                self._leases.forget(gone)
            swept = await self._take_singly(lapsed)
        return swept

    async def take_orphans(self) -> list[SweptRun]:
        """Look at some more runs, and take those that have lost their lease. Those whose lane does not exist get it."""
        look = await self._fetch(lost.orphans(after=self._looked_at, scan_limit=SCAN_LIMIT))
        self._looked_at = look.looked_at or 0
        if look.laneless and (made := await self._fetch(lanes.make_lanes(look.laneless))):
            log.warning("runs were stored while triggers did not fire; their lanes are there now", lanes=len(made))
        if not look.run_ids:
            return []
        log.warning("runs are running without a lease; taking them over", run_ids=look.run_ids[:20])
        return await self._each(
            look.run_ids,
            [
                lost.sweep_orphans([run_id], max_losses=self._max_losses, final_tasks=self._final_tasks)
                for run_id in look.run_ids
            ],
        )

    async def _take_many(self) -> list[SweptRun]:
        try:
            return await self._fetch(self._sweep())  # type: ignore[no-any-return]
        except DatabaseUnavailable as waited:
            if not isinstance(waited.__cause__, pg.LockNotAvailable):
                raise
        self._busy = await self._fetch(queries.busy_leases(limit=BUSY_LIMIT))
        log.warning(
            "runs of a lost worker cannot be taken over yet: a transaction has them locked, or their lanes. Find it in "
            "pg_stat_activity, by its xact_start",
            leases=len(self._busy),
        )
        return await self._fetch(self._sweep())  # type: ignore[no-any-return]

    def _sweep(self) -> Query[list[SweptRun]]:
        excluding = {*self._busy, *self._leases}
        return queries.sweep(limit=LEASE_LIMIT, max_losses=self._max_losses, excluding=excluding)

    async def _take_singly(self, lapsed: Iterable[tuple[int, list[int]]]) -> list[SweptRun]:
        swept: list[SweptRun] = []
        for lease_id, run_ids in lapsed:
            if lease_id in self._busy:
                continue
            try:
                swept += await self._fetch(lost.sweep_lease(lease_id, max_losses=self._max_losses))
                self._leases.forget(lease_id)
            except (DatabaseUnavailable, *REFUSED) as refused:
                if is_outage(refused):
                    raise
                self._leases.note(lease_id, refused, lease_id=lease_id, runs=len(run_ids))
                swept += await self._each(
                    run_ids,
                    [lost.sweep_run(lease_id, run_id, max_losses=self._max_losses) for run_id in run_ids],
                )
        return swept

    async def _each(self, run_ids: Iterable[int], takes: Iterable[Query[list[SweptRun]]]) -> list[SweptRun]:
        swept: list[SweptRun] = []
        for run_id, take in zip(run_ids, takes, strict=True):
            try:
                swept += await self._fetch(take)
                self._runs.forget(run_id)
            except (DatabaseUnavailable, *REFUSED) as refused:
                if is_outage(refused):
                    raise
                self._runs.note(run_id, refused, run_id=run_id)
        return swept
