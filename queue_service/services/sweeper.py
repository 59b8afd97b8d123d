"""Takes what has lapsed: turns that were promised an ending, leases of lost workers, and queued runs that were not
started in time.

Runs in every worker and wherever someone waits, without a leader: each statement is bounded, and what one replica is
taking the others step over. What a transaction of somebody's has locked is left until that ends, and holds up nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from datetime import timedelta
from typing import NamedTuple

from psycopg import errors as pg

from queue_service.db import channels
from queue_service.db.channels import Notify
from queue_service.db.execute import REFUSED
from queue_service.db.query import Fetch
from queue_service.errors import DatabaseUnavailable
from queue_service.logs import get_logger
from queue_service.runs import queries
from queue_service.turns import queries as turns
from queue_service.turns.model import EndedTurn

log = get_logger(__name__)

# Leases hold up to some four thousand runs each; the statement must stay well inside its deadline.
LEASE_LIMIT = 5
RUN_LIMIT = 1_000
# Lapsed leases among which the ones that cannot be taken are looked for.
BUSY_LIMIT = 100
TURN_LIMIT = 2_000
# Turns that are tried one by one where a batch of them is refused.
SINGLES = 100


class SweepCounts(NamedTuple):
    """Runs requeued, runs that ended (`failed` or `cancelled`), runs that expired; turns that were ended."""

    requeued: int
    ended: int
    expired: int
    turns: int = 0


class Sweeper:
    def __init__(self, fetch: Fetch, notify: Notify, *, max_losses: int, grace: timedelta = timedelta(0)) -> None:
        self._fetch = fetch
        self._notify = notify
        self._max_losses = max_losses
        self._grace = grace.total_seconds()
        self._disturbed = False
        # Leases that another transaction keeps from being taken, as far as is known.
        self._busy: Collection[int] = ()
        self._resume_at = 0.0
        # For how long the oldest turn was overdue when the last pass was over: None is as it should be.
        self.oldest_overdue: timedelta | None = None

    async def once(self) -> SweepCounts:
        """Sweep until nothing has lapsed. After an outage, leases and turns get `grace` first: they all lapsed while nobody
        could extend them, and whoever still lives is to have the first word."""
        try:
            expired = await self._expire()
            if self._disturbed:
                self._disturbed, self._resume_at = False, time.monotonic() + self._grace
            if time.monotonic() < self._resume_at:
                return SweepCounts(0, 0, expired, 0)
            requeued, ended = await self._sweep()
            ended_turns = await self.turns()
        except DatabaseUnavailable:
            self._disturbed = True
            raise
        return SweepCounts(requeued, ended, expired, ended_turns)

    async def turns(self) -> int:
        """End the turns whose deadline has passed, until none is left that could be taken."""
        count = 0
        while ended := await self._sweep_turns():
            count += len(ended)
            log.warning("ended turns that nobody answered in time", count=len(ended))
            self._notify(about_turns(ended))
        self.oldest_overdue = (await self._fetch(turns.tally())).oldest_overdue
        if count and self.oldest_overdue:
            log.info("turns are still overdue", oldest=str(self.oldest_overdue))
        return count

    async def _sweep_turns(self) -> list[EndedTurn]:
        try:
            swept: list[EndedTurn] = await self._fetch(turns.sweep(limit=TURN_LIMIT))
        except REFUSED as refused:
            log.error("a batch of turns cannot be ended; trying each", why=str(refused))
            return await self._sweep_singly()
        return swept

    async def _sweep_singly(self) -> list[EndedTurn]:
        """Step over the ones that cannot be ended, so that they do not hold up the others."""
        ended: list[EndedTurn] = []
        for deployment, message_id in await self._fetch(turns.overdue(limit=SINGLES)):
            try:
                ended += await self._fetch(turns.sweep_one(deployment, message_id))
            except REFUSED as refused:
                log.error("a turn cannot be ended", deployment=deployment, message_id=message_id, why=str(refused))
        return ended

    async def _sweep(self) -> tuple[int, int]:
        requeued = ended = 0
        if self._busy:
            self._busy = await self._fetch(queries.busy_leases(limit=BUSY_LIMIT))
        while swept := await self._sweep_runs():
            back = [run for run in swept if not run.state.finished]
            over = [run for run in swept if run.state.finished]
            requeued, ended = requeued + len(back), ended + len(over)
            log.warning("took over runs of a lost worker", requeued=len(back), ended=len(over))
            self._notify(
                [channels.enqueued(queue, priority) for queue, priority in {(run.queue, run.priority) for run in back}]
                + ([channels.about_runs(channels.FINISHED, [run.run_id for run in over])] if over else [])
            )
        return requeued, ended

    async def _sweep_runs(self) -> list[queries.SweptRun]:
        try:
            return await self._take()
        except DatabaseUnavailable as lost:
            if not isinstance(lost.__cause__, pg.LockNotAvailable):
                raise
        self._busy = await self._fetch(queries.busy_leases(limit=BUSY_LIMIT))
        log.warning(
            "runs of a lost worker cannot be taken over yet: a transaction has them locked, or their lanes. Find it in "
            "pg_stat_activity, by its xact_start",
            leases=len(self._busy),
        )
        return await self._take()

    async def _take(self) -> list[queries.SweptRun]:
        swept: list[queries.SweptRun] = await self._fetch(
            queries.sweep(limit=LEASE_LIMIT, max_losses=self._max_losses, excluding=self._busy)
        )
        return swept

    async def _expire(self) -> int:
        count = 0
        while expired := await self._fetch(queries.expire(limit=RUN_LIMIT)):
            count += len(expired)
            self._notify([channels.about_runs(channels.FINISHED, expired)])
        if count:
            log.info("runs expired before they were started", count=count)
        return count


def about_turns(ended: Collection[EndedTurn]) -> list[channels.Notice]:
    """For turns that ended: notices for the followers of their streams, and for whoever delivers."""
    heads: dict[str, int] = {}
    for each in ended:
        heads[each.stream] = max(each.seq, heads.get(each.stream, 0))
    delivery = [channels.enqueued("thread_response", 0)] if any(each.platform != "api" for each in ended) else []
    return channels.appended(heads) + delivery
