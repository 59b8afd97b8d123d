"""Takes what has lapsed: turns that were promised an ending, leases of lost workers, and queued runs that were not
started in time.

Runs in every worker and wherever someone waits, without a leader: each statement is bounded, and what one replica is
taking the others step over. What the database refuses of a batch is found one by one; of the three kinds none holds up
another.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import timedelta
from typing import NamedTuple, TypeVar

from queue_service.db import channels
from queue_service.db.channels import Notify
from queue_service.db.execute import REFUSED
from queue_service.db.meaning import is_about_a_row, is_outage
from queue_service.db.query import Fetch
from queue_service.errors import DatabaseUnavailable
from queue_service.exceptions import message
from queue_service.logs import get_logger
from queue_service.runs import lanes, queries
from queue_service.services.lost_runs import LostRuns
from queue_service.services.refusals import Refusals
from queue_service.turns import queries as turns
from queue_service.turns.model import EndedTurn
from queue_service.turns.queries import Key

T = TypeVar("T")

log = get_logger(__name__)

RUN_LIMIT = 1_000
TURN_LIMIT = 2_000
# Lanes that are looked at each time, in turn.
LANE_LIMIT = 100
FIRST_LANE = lanes.Lane("", "")
# What is tried one by one where a batch is refused.
SINGLES = 100


class SweepCounts(NamedTuple):
    """Runs requeued, runs that ended (`failed` or `cancelled`), runs that expired; turns that were ended."""

    requeued: int
    ended: int
    expired: int
    turns: int = 0


class Sweeper:
    """`final_tasks` are those of which a run is not begun twice."""

    def __init__(
        self,
        fetch: Fetch,
        notify: Notify,
        *,
        max_losses: int,
        grace: timedelta = timedelta(0),
        final_tasks: Collection[str] = (),
    ) -> None:
        self._fetch = fetch
        self._notify = notify
        self._grace = grace.total_seconds()
        self._disturbed = False
        self._resume_at = 0.0
        self._lost_runs = LostRuns(fetch, max_losses=max_losses, final_tasks=final_tasks)
        self._refused_late: Refusals[int] = Refusals("a run that expired cannot be ended")
        self._lane = FIRST_LANE
        self._refused_turns: Refusals[tuple[str, str]] = Refusals("a turn cannot be ended")
        # For how long the oldest turn was overdue when the last pass was over: None is as it should be.
        self.oldest_overdue: timedelta | None = None

    async def once(self) -> SweepCounts:
        """Sweep until nothing has lapsed. After an outage, leases and turns get `grace` first: they all lapsed while nobody
        could extend them, and whoever still lives is to have the first word. What one of the kinds raises is raised when
        the others have had their turn."""
        failures: list[Exception] = []

        async def step(sweep: Callable[[], Awaitable[T]], nothing: T) -> T:
            try:
                return await sweep()
            except Exception as failed:
                if isinstance(failed, DatabaseUnavailable):
                    self._disturbed = True
                    raise
                failures.append(failed)
                return nothing

        expired = await step(self._expire, 0)
        if self._disturbed:
            self._disturbed, self._resume_at = False, time.monotonic() + self._grace
        if time.monotonic() < self._resume_at:
            return SweepCounts(0, 0, expired, 0)
        requeued, ended = await step(self._sweep, (0, 0))
        await step(self._tend, None)
        counts = SweepCounts(requeued, ended, expired, await step(self.turns, 0))
        if failures:
            raise failures[0]
        return counts

    async def turns(self, refused: dict[Key, Exception] | None = None) -> int:
        """End the turns whose deadline has passed, until none is left that could be taken. Those that the database refuses
        to end are added to `refused`, each with its reason."""
        count = 0
        while ended := await self._sweep_turns({} if refused is None else refused):
            count += len(ended)
            log.warning("ended turns that nobody answered in time", count=len(ended))
            self._notify(about_turns(ended))
        self.oldest_overdue = await self._fetch(turns.oldest_overdue())
        if count and self.oldest_overdue:
            log.info("turns are still overdue", oldest=str(self.oldest_overdue))
        return count

    async def _sweep_turns(self, refused: dict[Key, Exception]) -> list[EndedTurn]:
        try:
            swept: list[EndedTurn] = await self._fetch(turns.sweep(limit=TURN_LIMIT))
        except (DatabaseUnavailable, *REFUSED) as together:
            if not is_about_a_row(together):
                raise
            # What each of those that are refused is refused for is logged once, and this would be with each sweep.
            log.debug("a batch of turns cannot be ended; trying each", why=message(together))
            return await self._sweep_singly(refused)
        return swept

    async def _sweep_singly(self, refused: dict[Key, Exception]) -> list[EndedTurn]:
        """Step over the ones that cannot be ended, so that they do not hold up the others."""
        ended: list[EndedTurn] = []
        for deployment, message_id in await self._fetch(turns.overdue(limit=SINGLES)):
            try:
                ended += await self._fetch(turns.sweep_one(deployment, message_id))
                self._refused_turns.forget((deployment, message_id))
            except (DatabaseUnavailable, *REFUSED) as alone:
                if is_outage(alone):
                    raise
                refused[deployment, message_id] = alone
                self._refused_turns.note((deployment, message_id), alone, deployment=deployment, message_id=message_id)
        return ended

    async def _sweep(self) -> tuple[int, int]:
        requeued = ended = 0
        await self._lost_runs.begin()
        takes = [self._lost_runs.take, self._lost_runs.take_orphans]
        while takes:
            swept = await takes[0]()
            if not swept:
                takes.pop(0)
                continue
            back, over = self._announce(swept)
            requeued, ended = requeued + back, ended + over
        return requeued, ended

    async def _tend(self) -> None:
        """Look at some lanes, for what nobody has told them of."""
        looked = await self._fetch(lanes.tend_after(self._lane, limit=LANE_LIMIT))
        self._lane = FIRST_LANE if looked is None else looked[0]

    def _announce(self, swept: Sequence[queries.SweptRun]) -> tuple[int, int]:
        """How many went back, and how many ended."""
        back = [run for run in swept if not run.state.finished]
        over = [run for run in swept if run.state.finished]
        log.warning("took over runs of a lost worker", requeued=len(back), ended=len(over))
        self._notify(
            [channels.enqueued(queue, priority) for queue, priority in {(run.queue, run.priority) for run in back}]
            + ([channels.about_runs(channels.FINISHED, [run.run_id for run in over])] if over else [])
        )
        return len(back), len(over)

    async def _expire(self) -> int:
        count = 0
        while expired := await self._expire_some():
            count += len(expired)
            self._notify([channels.about_runs(channels.FINISHED, expired)])
        if count:
            log.info("runs expired before they were started", count=count)
        return count

    async def _expire_some(self) -> list[int]:
        try:
            return await self._fetch(queries.expire(limit=RUN_LIMIT))  # type: ignore[no-any-return]
        except (DatabaseUnavailable, *REFUSED) as refused:
            if not is_about_a_row(refused):
                raise
        expired: list[int] = []
        for run_id in await self._fetch(queries.late(limit=SINGLES)):
            try:
                expired += await self._fetch(queries.expire_one(run_id))
                self._refused_late.forget(run_id)
            except (DatabaseUnavailable, *REFUSED) as refused:
                if is_outage(refused):
                    raise
                self._refused_late.note(run_id, refused, run_id=run_id)
        return expired


def about_turns(ended: Collection[EndedTurn]) -> list[channels.Notice]:
    """For turns that ended: notices for the followers of their streams, and for whoever delivers."""
    heads: dict[str, int] = {}
    for each in ended:
        heads[each.stream] = max(each.seq, heads.get(each.stream, 0))
    delivery = [channels.enqueued("thread_response", 0)] if any(each.platform != "api" for each in ended) else []
    return channels.appended(heads) + delivery
