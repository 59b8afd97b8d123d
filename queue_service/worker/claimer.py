"""Decides when to ask for runs, and for how many; never runs a handler.

Claims start from the floors, and follow notices and free slots. A scan from the front comes once each poll interval, and
sooner after a claim that came back short, since what commits behind a floor is seen by nothing else. A scan may cost
much (it walks what vacuum could not remove yet), so the pause after it is at least 25 times what it took.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import timedelta

from queue_service.db.pool import Wire
from queue_service.db.query import Query
from queue_service.errors import DatabaseUnavailable
from queue_service.logs import get_logger
from queue_service.runs import queries
from queue_service.runs.model import Return, Run
from queue_service.runs.queries import Allowed, Claimant, Wanted
from queue_service.worker.executor import Executor
from queue_service.worker.finisher import Finisher
from queue_service.worker.floors import Floors
from queue_service.worker.leases import Held, Leases

log = get_logger(__name__)

SCAN_SHARE = 25.0
SOON = 0.010
ONCE_PAUSE = 0.020
MAX_PAUSE = 5.0
# A run that lost its worker runs alone in its process: for at most this long we wait until nothing else runs, and for
# at most this long it is left alone once begun. After that, it shares the process like any other.
PATIENCE = 1.0
PROBATION = 2.0
# Runs that one statement claims of several queues: the sweep can take a lease of so many.
AT_ONCE = 1_000
# A queue at its limit is not asked again for this long, unless a run of it ends here.
AT_LIMIT = 0.050
# Suspects in a row before ordinary runs get their turn.
SUSPECTS = 20

# A queue's executor, and how many runs it wants.
Ready = tuple[Executor, int]


class Claimer:
    def __init__(
        self,
        wire: Wire,
        executors: Mapping[str, Executor],
        leases: Leases,
        finisher: Finisher,
        claimant: Claimant,
        *,
        poll_interval: timedelta,
    ) -> None:
        self._wire = wire
        self._executors = executors
        self._leases = leases
        self._finisher = finisher
        self._claimant = claimant
        self._poll = poll_interval.total_seconds()
        self._floors = Floors()
        # Queues that may have more than was claimed, and those of which a lane may be free. Only queues that were seen to
        # have lanes are looked at for them, but for the scan, which looks everywhere.
        self._hopeful: set[str] = set(executors)
        self._freed: set[str] = set()
        self._laned: set[str] = set()
        # Queues that have a limit, until when one is not worth asking, and those of which a run has ended since they were
        # asked. Of their lanes and their other runs, each may be first in turn, since they share what there is.
        self._limited: set[str] = set()
        self._not_before: dict[str, float] = {}
        self._roomier: set[str] = set()
        self._lanes_first = True
        self._wake = asyncio.Event()
        self._stopping = False
        self._next_scan = 0.0
        self._earliest_scan = 0.0
        self._next_suspect = 0.0
        # Queues without a free slot, when suspects of some of them were due.
        self._awaited: set[str] = set()
        self.last_pass = time.monotonic()
        # Since when claims do not go through.
        self.lost_since: float | None = None

    # What others tell it

    def wake(self) -> None:
        """There is room for more, or reason to look."""
        self._wake.set()

    def hint(self, queue: str, priority: int) -> None:
        """A notice: something was enqueued there."""
        if queue in self._executors:
            self._floors.hint(queue, priority)
            self._hopeful.add(queue)
            self._freed |= self._laned & {queue}
            self._wake.set()

    def free(self, laned: Collection[str], limited: Collection[str]) -> None:
        """A run that stood in a lane of these queues, or counted in the limit of those, is not running any more."""
        self._laned.update(laned)
        self._freed.update(laned)
        for queue in limited:
            self._not_before.pop(queue, None)
            self._roomier.add(queue)
            self._hopeful.add(queue)
            self._freed |= self._laned & {queue}
        self._wake.set()

    def rescan(self) -> None:
        """Notices may have been lost: look everywhere as soon as the pace of scans allows."""
        self._next_scan = 0.0
        self._wake.set()

    @property
    def is_stopping(self) -> bool:
        return self._stopping

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    # The loop

    async def run(self, *, once: bool = False) -> None:
        """Claim until stopped; with `once`, until nothing is due and all that was claimed has ended."""
        pause = 0.1
        while not self._stopping:
            try:
                only_waited = await self._pass(ONCE_PAUSE if once else self._poll)
                if only_waited and once and await self._is_drained():
                    return
                if self.lost_since is not None and not only_waited:
                    log.info("claiming again")
                    pause, self.lost_since = 0.1, None
            except DatabaseUnavailable as lost:
                if self.lost_since is None:
                    self.lost_since = time.monotonic()
                    log.warning("cannot claim; trying until the database is back", why=str(lost))
                self.rescan()
                await self._sleep(pause)
                pause = min(pause * 2, MAX_PAUSE)

    async def _pass(self, longest: float) -> bool:
        """One step: a scan, or claims, or a wait. True if there was nothing to do but wait."""
        self.last_pass = now = time.monotonic()
        if now >= max(self._next_scan, self._earliest_scan):
            await self._scan(now)
            return False
        if any(self._executors[queue].wanted() > 0 for queue in self._awaited):
            await self._claim_suspects()
            return False
        busy = False
        for limited in (False, True):
            kinds = [(self._freed, self._claim_lanes), (self._hopeful, self._claim)]
            for queues, claim in kinds if self._lanes_first else kinds[::-1]:
                for some in _batches(self._ready(queues, now, limited=limited)):
                    busy = True
                    await claim(some, limited=limited)
        if not busy:
            await self._sleep(min(longest, self._next_look(now) - now))
        return not busy

    def _next_look(self, now: float) -> float:
        """When there is something to do that nobody tells of."""
        # A time that has passed says nothing more: what waits for a slot since then is told of when there is one.
        asked = (self._not_before.get(queue, 0.0) for queue in self._hopeful | self._freed)
        return min([max(self._next_scan, self._earliest_scan), *(at for at in asked if at > now)])

    def _ready(self, queues: Collection[str], now: float, *, limited: bool) -> list[Ready]:
        """Those to be claimed from now. What a limit allows is not claimed ahead: others could begin it at once."""
        names = [queue for queue in queues if (queue in self._limited) is limited and self._may_ask(queue, now)]
        wanted = {queue: self._executors[queue].wanted(ahead=not limited) for queue in names}
        return [(self._executors[queue], count) for queue, count in wanted.items() if count > 0]

    def _may_ask(self, queue: str, now: float) -> bool:
        return self._not_before.get(queue, now) <= now

    async def _scan(self, now: float) -> None:
        self._hand_back_stalled(now)
        await self._look_everywhere()
        cost = time.monotonic() - now
        self._earliest_scan = now + cost + max(SOON, cost * SCAN_SHARE)
        self._next_scan = now + cost + self._poll
        if now >= self._next_suspect:
            await self._claim_suspects()

    async def _look_everywhere(self) -> None:
        # Emptied before the look: a hint that comes while it is under way tells of something it may not see.
        self._hopeful.clear()
        self._freed.clear()
        scan = await self._wire.fetch(
            queries.scan(list(self._executors), self._claimant.tasks, owner=self._claimant.owner)
        )
        due = self._floors.scanned(scan)
        self._hopeful |= due
        self._limited = self._limited - due - scan.laned | scan.limited
        self._laned |= scan.laned
        self._freed |= scan.laned

    async def _claim(self, ready: Sequence[Ready], *, limited: bool) -> None:
        # Dropped before the claim, for the same reason.
        self._hopeful.difference_update(executor.queue for executor, _ in ready)
        asked = [Wanted(executor.queue, count, self._floors.of(executor.queue)) for executor, count in ready]
        if limited:
            claimed = await self._within_limits(queries.claim_limited(asked, self._claimant), ready, self._hopeful)
        else:
            claimed = await self._wire.fetch(queries.claim(asked, self._claimant))
        for executor, wanted, held in self._by_queue(ready, claimed, limited=limited):
            self._floors.claimed(executor.queue, [each.run for each in held])
            if len(held) == wanted:
                self._hopeful.add(executor.queue)
            elif not limited:
                # Short: the queue is empty, or what is left stands behind the floor.
                self._scan_soon()
            self._offer(executor, held)

    async def _claim_lanes(self, ready: Sequence[Ready], *, limited: bool) -> None:
        self._freed.difference_update(executor.queue for executor, _ in ready)
        asked = [(executor.queue, wanted) for executor, wanted in ready]
        if limited:
            claimed = await self._within_limits(queries.claim_limited_lanes(asked, self._claimant), ready, self._freed)
        else:
            claimed = await self._wire.fetch(queries.claim_lanes(asked, self._claimant))
        for executor, wanted, held in self._by_queue(ready, claimed, limited=limited):
            if len(held) == wanted:
                self._freed.add(executor.queue)
            self._offer(executor, held)

    async def _within_limits(
        self, query: Query[Allowed], ready: Sequence[Ready], again: set[str]
    ) -> list[tuple[Run, int]]:
        """What was claimed; queues to be asked once more are added to `again`, and none is asked before that can help."""
        self._roomier.difference_update(executor.queue for executor, _ in ready)
        allowed = await self._wire.fetch(query)
        now = time.monotonic()
        gave = {run.queue for run, _ in allowed.runs}
        if gave:
            # The others come first next time.
            self._lanes_first = again is self._hopeful
        for queue in {executor.queue for executor, _ in ready}:
            if queue not in allowed.waits:
                # Another session is claiming from it at this moment; or it has no limit any more, which a scan tells.
                self._not_before[queue] = now + SOON
                self._scan_soon()
                again.add(queue)
            elif (wait := allowed.waits[queue]) is not None:
                self._not_before[queue] = now + wait
                again.add(queue)
            elif queue not in gave and queue not in self._roomier:
                self._not_before[queue] = now + AT_LIMIT
        return allowed.runs

    def _scan_soon(self) -> None:
        """As soon as the pace of scans allows."""
        self._next_scan = min(self._next_scan, self._earliest_scan)

    def _by_queue(
        self, ready: Sequence[Ready], claimed: list[tuple[Run, int]], *, limited: bool
    ) -> Iterator[tuple[Executor, int, list[Held]]]:
        held: dict[str, list[Held]] = {executor.queue: [] for executor, _ in ready}
        for each in self._leases.take(claimed, limited=limited):
            held[each.run.queue].append(each)
        for executor, wanted in ready:
            yield executor, wanted, held[executor.queue]

    def _offer(self, executor: Executor, held: list[Held]) -> None:
        if self._stopping:
            for each in held:
                self._finisher.put(each, Return(each.run.claim))
        else:
            executor.offer(held)

    def _hand_back_stalled(self, now: float) -> None:
        """Give up what waits behind handlers that stopped ending: another worker may be free."""
        for executor in self._executors.values():
            for held in executor.take_back_stalled(now):
                self._finisher.put(held, Return(held.run.claim))

    # Suspects

    async def _claim_suspects(self) -> None:
        """Run those that lost a worker, one at a time and alone; ordinary runs then get at least as long a turn."""
        begun = time.monotonic()
        self._next_suspect = begun + self._poll
        free = self._with_room()
        full, self._awaited = self._executors.keys() - free, set()
        if not await self._is_suspect_due(free):
            # For one whose queue has no free slot nobody is kept waiting: its turn comes when there is one.
            if full and await self._is_suspect_due(full):
                self._awaited = full
            return
        await self._until_idle(PATIENCE)
        for _ in range(SUSPECTS):
            if self._stopping:
                return
            self.last_pass = time.monotonic()
            claimed = await self._wire.fetch(queries.claim_suspect(self._with_room(), self._claimant))
            if not claimed:
                break
            run, _ = claimed[0]
            log.info("running alone, since it lost its worker before", run_id=run.id)
            self._offer(self._executors[run.queue], self._leases.take(claimed, limited=run.queue in self._limited))
            await self._until_idle(PROBATION)
        now = time.monotonic()
        self._next_suspect = now + max(self._poll, now - begun)

    def _with_room(self) -> list[str]:
        return [queue for queue, executor in self._executors.items() if executor.wanted() > 0]

    async def _is_suspect_due(self, queues: Collection[str]) -> bool:
        return await self._wire.fetch(queries.suspect_is_due(queues, self._claimant.tasks))

    async def _until_idle(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not all(executor.is_idle for executor in self._executors.values()):
            left = deadline - time.monotonic()
            if left <= 0 or self._stopping:
                return
            await self._sleep(left)

    async def _is_drained(self) -> bool:
        """Nothing runs, nothing is being written, and a look from the front finds nothing that is due."""
        if (
            self._hopeful
            or self._freed
            or not self._finisher.is_idle
            or not all(each.is_idle for each in self._executors.values())
        ):
            return False
        await self._look_everywhere()
        if self._hopeful or self._freed:
            return False
        return not await self._is_suspect_due(self._executors.keys())

    async def _sleep(self, seconds: float) -> None:
        self._wake.clear()
        try:
            async with asyncio.timeout(max(seconds, 0)):
                await self._wake.wait()
        except TimeoutError:
            pass


def _batches(ready: Sequence[Ready]) -> Iterator[Sequence[Ready]]:
    """What goes into one statement: one queue, or as many as want no more than `AT_ONCE` runs together."""
    batch: list[Ready] = []
    for each in ready:
        if batch and sum(wanted for _, wanted in batch) + each[1] > AT_ONCE:
            yield batch
            batch = []
        batch.append(each)
    if batch:
        yield batch
