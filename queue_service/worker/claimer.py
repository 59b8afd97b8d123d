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
from queue_service.errors import DatabaseUnavailable
from queue_service.logs import get_logger
from queue_service.runs import queries
from queue_service.runs.model import Return, Run
from queue_service.runs.queries import Wanted
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
        *,
        tasks: list[str],
        worker_id: int,
        lease: timedelta,
        poll_interval: timedelta,
        owner: str,
    ) -> None:
        self._wire = wire
        self._executors = executors
        self._leases = leases
        self._finisher = finisher
        self._tasks = tasks
        self._worker_id = worker_id
        self._lease = lease
        self._poll = poll_interval.total_seconds()
        self._owner = owner
        self._floors = Floors()
        # Queues that may have more than was claimed, and those of which a lane may be free. Only queues that were seen to
        # have lanes are looked at for them, but for the scan, which looks everywhere.
        self._hopeful: set[str] = set(executors)
        self._freed: set[str] = set()
        self._laned: set[str] = set()
        self._wake = asyncio.Event()
        self._stopping = False
        self._next_scan = 0.0
        self._earliest_scan = 0.0
        self._next_suspect = 0.0
        self.last_pass = time.monotonic()

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

    def free(self, queues: Collection[str]) -> None:
        """A run that stood in a lane of these queues is not running any more."""
        self._laned.update(queues)
        self._freed.update(queues)
        self._wake.set()

    def rescan(self) -> None:
        """Notices may have been lost: look everywhere as soon as the pace of scans allows."""
        self._next_scan = 0.0
        self._wake.set()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    # The loop

    async def run(self, *, once: bool = False) -> None:
        """Claim until stopped; with `once`, until nothing is due and all that was claimed has ended."""
        pause = 0.1
        while not self._stopping:
            try:
                if await self._pass(ONCE_PAUSE if once else self._poll) and once and await self._is_drained():
                    return
                if pause > 0.1:
                    log.info("claiming again")
                pause = 0.1
            except DatabaseUnavailable as lost:
                if pause == 0.1:
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
        lanes = self._ready(self._freed)
        for some in _batches(lanes):
            await self._claim_lanes(some)
        ready = self._ready(self._hopeful)
        for some in _batches(ready):
            await self._claim(some)
        if not ready and not lanes:
            await self._sleep(min(longest, max(self._next_scan, self._earliest_scan) - now))
        return not ready and not lanes

    def _ready(self, queues: Collection[str]) -> list[Ready]:
        executors = [self._executors[queue] for queue in queues]
        return [(executor, wanted) for executor in executors if (wanted := executor.wanted()) > 0]

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
        scan = await self._wire.fetch(queries.scan(list(self._executors), self._tasks, owner=self._owner))
        self._hopeful |= self._floors.scanned(scan)
        self._laned |= scan.laned
        self._freed |= scan.laned

    async def _claim(self, ready: Sequence[Ready]) -> None:
        # Dropped before the claim, for the same reason.
        self._hopeful.difference_update(executor.queue for executor, _ in ready)
        claimed = await self._wire.fetch(
            queries.claim(
                [Wanted(executor.queue, count, self._floors.of(executor.queue)) for executor, count in ready],
                tasks=self._tasks,
                worker_id=self._worker_id,
                lease=self._lease,
                owner=self._owner,
            )
        )
        for executor, wanted, held in self._by_queue(ready, claimed):
            self._floors.claimed(executor.queue, [each.run for each in held])
            if len(held) == wanted:
                self._hopeful.add(executor.queue)
            else:
                # Short: the queue is empty, or what is left stands behind the floor.
                self._next_scan = min(self._next_scan, self._earliest_scan)
            self._offer(executor, held)

    async def _claim_lanes(self, ready: Sequence[Ready]) -> None:
        self._freed.difference_update(executor.queue for executor, _ in ready)
        claimed = await self._wire.fetch(
            queries.claim_lanes(
                [(executor.queue, wanted) for executor, wanted in ready],
                tasks=self._tasks,
                worker_id=self._worker_id,
                lease=self._lease,
                owner=self._owner,
            )
        )
        for executor, wanted, held in self._by_queue(ready, claimed):
            if len(held) == wanted:
                self._freed.add(executor.queue)
            self._offer(executor, held)

    def _by_queue(
        self, ready: Sequence[Ready], claimed: list[tuple[Run, int]]
    ) -> Iterator[tuple[Executor, int, list[Held]]]:
        held: dict[str, list[Held]] = {executor.queue: [] for executor, _ in ready}
        for each in self._leases.take(claimed):
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
        if not await self._wire.fetch(queries.suspect_is_due(list(self._executors), self._tasks)):
            return
        await self._until_idle(PATIENCE)
        for _ in range(SUSPECTS):
            if self._stopping:
                return
            free = [queue for queue, executor in self._executors.items() if executor.wanted() > 0]
            claimed = await self._wire.fetch(
                queries.claim_suspect(free, self._tasks, worker_id=self._worker_id, lease=self._lease)
            )
            if not claimed:
                break
            log.info("running alone, since it lost its worker before", run_id=claimed[0][0].id)
            self._executors[claimed[0][0].queue].offer(self._leases.take(claimed))
            await self._until_idle(PROBATION)
        now = time.monotonic()
        self._next_suspect = now + max(self._poll, now - begun)

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
        return not await self._wire.fetch(queries.suspect_is_due(list(self._executors), self._tasks))

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
