"""Takes what has lapsed: leases of lost workers, and queued runs that were not started in time.

Runs in every worker, without a leader: each pass is bounded, and what one replica is taking the others step over.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, NamedTuple

from queue_service.db import channels
from queue_service.db.query import Query
from queue_service.errors import DatabaseUnavailable
from queue_service.logs import get_logger
from queue_service.runs import queries

log = get_logger(__name__)

# Leases hold up to a thousand runs each; the statement must stay well inside its deadline.
LEASES = 20
RUNS = 1_000

Fetch = Callable[[Query[Any]], Awaitable[Any]]
Notify = Callable[[list[channels.Notice]], None]


class Swept(NamedTuple):
    """Runs requeued, runs that ended (`failed` or `cancelled`), runs that expired."""

    requeued: int
    ended: int
    expired: int


class Sweeper:
    def __init__(self, fetch: Fetch, notify: Notify, *, max_losses: int, grace: timedelta = timedelta(0)) -> None:
        self._fetch = fetch
        self._notify = notify
        self._max_losses = max_losses
        self._grace = grace.total_seconds()
        self._disturbed = False
        self._resume_at = 0.0

    async def once(self) -> Swept:
        """Sweep until nothing has lapsed. After an outage, leases are left alone for `grace`: they all lapsed while nobody
        could extend them, and whoever still lives is to have the first word."""
        try:
            expired = await self._expire()
            if self._disturbed:
                self._disturbed, self._resume_at = False, time.monotonic() + self._grace
            requeued, ended = await self._sweep() if time.monotonic() >= self._resume_at else (0, 0)
        except DatabaseUnavailable:
            self._disturbed = True
            raise
        return Swept(requeued, ended, expired)

    async def _sweep(self) -> tuple[int, int]:
        requeued = ended = 0
        while swept := await self._fetch(queries.sweep(limit=LEASES, max_losses=self._max_losses)):
            back = [run for run in swept if not run.state.finished]
            over = [run for run in swept if run.state.finished]
            requeued, ended = requeued + len(back), ended + len(over)
            log.warning("took over runs of a lost worker", requeued=len(back), ended=len(over))
            self._notify(
                [channels.enqueued(queue, priority) for queue, priority in {(run.queue, run.priority) for run in back}]
                + ([channels.about_runs(channels.FINISHED, [run.run_id for run in over])] if over else [])
            )
        return requeued, ended

    async def _expire(self) -> int:
        count = 0
        while expired := await self._fetch(queries.expire(limit=RUNS)):
            count += len(expired)
            self._notify([channels.about_runs(channels.FINISHED, expired)])
        if count:
            log.info("runs expired before they were started", count=count)
        return count
