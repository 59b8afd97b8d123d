"""Takes what has lapsed: leases of lost workers, and queued runs that were not started in time.

Runs in every worker, without a leader: each pass is bounded, and what one replica is taking the others step over.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from queue_service.db import channels
from queue_service.db.query import Query
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
    def __init__(self, fetch: Fetch, notify: Notify, *, max_losses: int) -> None:
        self._fetch = fetch
        self._notify = notify
        self._max_losses = max_losses

    async def once(self) -> Swept:
        """Sweep until nothing has lapsed."""
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
        return Swept(requeued, ended, await self._expire())

    async def _expire(self) -> int:
        count = 0
        while expired := await self._fetch(queries.expire(limit=RUNS)):
            count += len(expired)
            self._notify([channels.about_runs(channels.FINISHED, expired)])
        if count:
            log.info("runs expired before they were started", count=count)
        return count
