"""Deletes what is old: partitions of history, steps of runs that went with them, turns that ended, events, silent workers,
and connections and deployments long lapsed; and makes the partitions of the days to come.

Any number of processes may do this at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from datetime import timedelta
from typing import NamedTuple, TypeVar

from queue_service.connections import queries as connections
from queue_service.db.pool import Pool
from queue_service.deployments import queries as deployments
from queue_service.events import queries as events
from queue_service.logs import get_logger
from queue_service.roster import queries as roster
from queue_service.services.partitions import Changed, Partitions
from queue_service.steps import queries as steps
from queue_service.turns import queries as turns

T = TypeVar("T")

log = get_logger(__name__)

EVENTS_AT_ONCE = 5_000
STREAMS = 500
TURNS_AT_ONCE = 500
STEPS_AT_ONCE = 1_000
SILENCE = timedelta(days=1)


class Pruned(NamedTuple):
    """Partitions made, dropped, and replaced by what failed; turns, events and steps forgotten."""

    made: Sequence[str] = ()
    dropped: Sequence[str] = ()
    thinned: Sequence[str] = ()
    turns: int = 0
    events: int = 0
    steps: int = 0


class Pruner:
    def __init__(self, pool: Pool, *, retention: timedelta, retention_failed: timedelta = timedelta(0)) -> None:
        self._pool = pool
        self._retention = retention
        self.partitions = Partitions(pool, retention=retention, retention_failed=retention_failed)

    async def once(self) -> Pruned:
        """Partitions first, for which there is a time; what is old can wait, and there may be much of it. What one of these
        raises is raised when the others have had their turn."""
        failures: list[Exception] = []

        async def tried(prune: Awaitable[T], nothing: T) -> T:
            try:
                return await prune
            except Exception as failed:  # noqa: BLE001 - raised in the end
                failures.append(failed)
                return nothing

        made, dropped = await tried(self.partitions.make_and_drop(), Changed([], []))
        await tried(self._pool.fetch(roster.prune(SILENCE)), [])
        await tried(self._pool.fetch(connections.prune(SILENCE)), None)
        await tried(self._pool.fetch(deployments.prune(SILENCE)), None)
        thinned = await tried(self.partitions.thin(), [])
        pruned = Pruned(
            made, dropped, thinned,
            turns=await tried(self._turns(), 0), events=await tried(self._events(), 0), steps=await tried(self._steps(), 0),
        )  # fmt: skip
        if failures:
            raise failures[0]
        return pruned

    async def _turns(self) -> int:
        """Forget turns, batch after batch, each a short transaction."""
        count = 0
        while gone := await self._pool.fetch(turns.prune(self._retention, limit=TURNS_AT_ONCE)):
            count += gone
        if count:
            log.info("forgot turns that ended long ago", count=count)
        return count

    async def _events(self) -> int:
        """Trim stream after stream. What was trimmed before has few events left in front of the first fresh one."""
        count, at = 0, ""
        while streams := await self._pool.fetch(events.aged(self._retention, after=at, limit=STREAMS)):
            for stream, upto in streams:
                while upto is not None and (
                    gone := await self._pool.fetch(events.trim(stream, upto=upto, limit=EVENTS_AT_ONCE))
                ):
                    count += gone
            at = streams[-1][0]
        if count:
            log.info("deleted old events", count=count)
        return count

    async def _steps(self) -> int:
        """Forget the steps of runs that are gone. A run that went with its day has ended before `retention`, and its steps
        are older than that: no other step is looked at."""
        count = 0
        place: steps.Place | None = steps.Place()
        while place is not None:
            gone, place = await self._pool.fetch(steps.prune(self._retention, place, scan_limit=STEPS_AT_ONCE))
            count += gone
        if count:
            log.info("forgot steps of runs that are gone", count=count)
        return count
