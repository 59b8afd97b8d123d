"""Sends the statements that scan and claim, and notes in the state of each queue what they find."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

from queue_service.db.pool import Fetcher
from queue_service.logs import get_logger
from queue_service.runs import lanes, lost, queries
from queue_service.runs.model import Run
from queue_service.runs.queries import Claimant, DuePriority, Taken, Wanted
from queue_service.worker.executor import Executor
from queue_service.worker.finisher import Finisher
from queue_service.worker.handlers import results
from queue_service.worker.leases import Held, Leases
from queue_service.worker.pace import SOON, Alarm, Pace
from queue_service.worker.queue_state import Asked, QueueState, Source

log = get_logger(__name__)

# Lanes of a queue and task that are tended at once. Those that gave nothing are among the first.
TENDED = 200


class Claims:
    """`order` is how the sources come in turn where they share what a limit allows: the one that gave last comes last."""

    def __init__(
        self, connection: Fetcher, states: Mapping[str, QueueState], leases: Leases, finisher: Finisher,
        claimant: Claimant, pace: Pace, alarm: Alarm,
    ) -> None:  # fmt: skip
        self._connection = connection
        self._states = states
        self._leases = leases
        self._finisher = finisher
        self._claimant = claimant
        self._pace = pace
        self._alarm = alarm
        self.order = [Source.LANES, Source.QUEUE]
        # Queues of which lanes gave nothing.
        self._untended: set[str] = set()
        # Until when there may be leases of ours that we do not know of.
        self._unheard_until: float | None = None

    async def scan(self) -> float:
        """Look from the front of every queue, and note what a claim could get. Returns what that cost, in seconds of the
        database's, where it cost more than it gives."""
        # Forgotten before the look: a notice that comes while it is under way is about something it may not see.
        for state in self._states.values():
            state.may_give.clear()
        await self._release_unheard()
        query = queries.scan(list(self._states), self._claimant.tasks, owner=self._claimant.owner)
        scan = await self._connection.fetch(query)
        due: defaultdict[str, list[DuePriority]] = defaultdict(list)
        for each in scan.due:
            due[each.queue].append(each)
        for name, state in self._states.items():
            state.scanned(scan, due[name])
        # A list that was cut short is used up soon, and then it is the next scan that finds more.
        return 0.0 if any(state.floors.is_cut for state in self._states.values()) else scan.cost

    async def claim(self, source: Source, asked: Sequence[Asked], *, limited: bool) -> None:
        """Take runs from one source of these queues, and give them to the executors."""
        for state, _ in asked:
            # Before the claim, for the same reason.
            state.may_give.discard(source)
        if source is Source.QUEUE and not limited:
            claim: Awaitable[list[tuple[Run, int]]] = self._connection.fetch(
                queries.claim(_from_floors(asked), self._claimant)
            )
        else:
            claim = self._take(source, asked, limited=limited)
        held: defaultdict[str, list[Held]] = defaultdict(list)
        for each in await self._taken(claim, limited=lambda _: limited):
            if each.run.unreadable is None:
                held[each.run.queue].append(each)
            else:
                self._end_unread(each)
        for state, count in asked:
            got = held[state.name]
            state.has_got |= bool(got)
            if source is Source.QUEUE:
                state.floors.claimed([each.run for each in got])
            if len(got) == count:
                state.may_give.add(source)
            elif state.rank == 0:
                self._came_short(state, source, got_some=bool(got), limited=limited)
            self._offer(state.executor, got)

    def _came_short(self, state: QueueState, source: Source, *, got_some: bool, limited: bool) -> None:
        now = time.monotonic()
        if source is Source.LANES:
            # There are no more, or somebody holds them.
            if got_some:
                state.missed.reset()
            self._pace.scan_soon(now + state.missed.next())
        elif not limited:
            # The queue is empty, or what is left stands behind the floor.
            self._pace.scan_soon(now + SOON if got_some else 0.0)

    async def _take(self, source: Source, asked: Sequence[Asked], *, limited: bool) -> list[tuple[Run, int]]:
        """Claim of lanes, or within limits."""
        for state, _ in asked:
            state.was_freed = False
        if source is Source.QUEUE:
            query = queries.claim_limited(_from_floors(asked), self._claimant)
        else:
            claim = queries.claim_limited_lanes if limited else queries.claim_lanes
            query = claim(_from_lanes(asked), self._claimant)
        taken = await self._connection.fetch(query)
        if limited:
            self._note_limits(source, asked, taken)
        for state, _ in asked:
            if state.name in taken.unfinished:
                state.may_give.add(source)
        if taken.barren:
            self._untended |= taken.barren
        return taken.runs

    def _note_limits(self, source: Source, asked: Sequence[Asked], taken: Taken) -> None:
        gave = {run.queue for run, _ in taken.runs}
        if gave:
            # The others come first next time.
            self.order.sort(key=lambda each: each is source)
        now = time.monotonic()
        for state, _ in asked:
            if not state.claimed_within_limit(source, taken, now, got_some=state.name in gave):
                self._pace.scan_soon()

    @property
    def has_untended_lanes(self) -> bool:
        return bool(self._untended)

    async def tend_lanes(self) -> None:
        """Look at lanes that gave nothing, so that they stand before nobody. If that changes any, others may be behind."""
        queues, self._untended = sorted(self._untended), set()
        by = self._claimant
        if await self._connection.fetch(lanes.tend_lanes(queues, by.tasks, limit=TENDED, owner=by.owner)):
            for queue in queues:
                self._states[queue].lane_freed()

    async def suspect_is_due(self, queues: Collection[str]) -> bool:
        """Whether `claim_suspect` would find one."""
        return await self._connection.fetch(queries.suspect_is_due(queues, self._claimant.tasks))

    async def claim_suspect(self, queues: Sequence[str]) -> bool:
        """Take one run that lost a worker before. False: none of these queues has one that is due."""
        claim = self._connection.fetch(queries.claim_suspect(queues, self._claimant))
        taken = await self._taken(claim, limited=lambda queue: self._states[queue].has_limit)
        for held in taken:
            run = held.run
            if run.unreadable is None:
                log.info("running alone, since it lost its worker before", run_id=run.id)
                self._offer(self._states[run.queue].executor, [held])
            else:
                self._end_unread(held)
        return bool(taken)

    def hand_back_stalled(self, now: float) -> None:
        """Give up what waits behind handlers that stopped ending: another worker may be free."""
        for state in self._states.values():
            self._finisher.hand_back(state.executor.take_back_stalled(now))

    async def _taken(self, claim: Awaitable[list[tuple[Run, int]]], *, limited: Callable[[str], bool]) -> list[Held]:
        """What the claim got; none of it where the answer has come so late that others may have it soon."""
        began = time.monotonic()
        try:
            claimed = await claim
        except BaseException:
            # It may have been executed.
            self._unheard_until = time.monotonic() + self._claimant.lease.total_seconds()
            raise
        if not claimed:
            return []
        held = self._leases.take(claimed, began, limited=limited(claimed[0][0].queue))
        if time.monotonic() - began < self._claimant.lease.total_seconds() / 2:
            return held
        log.warning("a claim was answered too late; its runs go back unbegun", runs=len(held))
        self._finisher.hand_back(held)
        return []

    async def _release_unheard(self) -> None:
        """Give back what was claimed by a statement whose answer never came. That statement may even be executed later, so
        we look for it for the length of a lease."""
        if self._unheard_until is None:
            return
        is_last = time.monotonic() > self._unheard_until
        released = await self._connection.fetch(lost.release_unheard(self._claimant.worker_id, known=self._leases.ids))
        if released:
            log.warning("what was claimed by a statement that was not answered goes back unbegun", runs=len(released))
        if is_last:
            self._unheard_until = None

    def _end_unread(self, held: Held) -> None:
        run = held.run
        log.error("a run cannot be read, and ends", run_id=run.id, queue=run.queue, task=run.task, why=run.unreadable)
        self._finisher.put(held, results.unreadable(run))

    def _offer(self, executor: Executor, held: list[Held]) -> None:
        if self._alarm.is_stopping:
            self._finisher.hand_back(held)
        else:
            executor.offer(held)


def _from_floors(asked: Sequence[Asked]) -> list[Wanted]:
    return [Wanted(state.name, count, state.floors.by_priority) for state, count in asked]


def _from_lanes(asked: Sequence[Asked]) -> list[tuple[str, int]]:
    return [(state.name, count) for state, count in asked]
