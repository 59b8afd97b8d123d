"""Decides when to ask for runs, and for how many; never runs a handler.

Each pass of the loop does one thing: a scan, if `Pace` says that one is due; or suspects, if some can run now; or a claim
from every queue that may give something and has room; or it sleeps until one of these is due or somebody wakes it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta

from queue_service.backoff import Pauses
from queue_service.db.pool import Fetcher
from queue_service.roster.queries import Fleet
from queue_service.runs.queries import Claimant
from queue_service.services.loop import Service
from queue_service.worker.claims import Claims
from queue_service.worker.executor import Executor
from queue_service.worker.finisher import Finisher
from queue_service.worker.groups import DELIVERIES
from queue_service.worker.leases import Leases
from queue_service.worker.looks import Looks
from queue_service.worker.pace import Alarm, Pace
from queue_service.worker.queue_state import QueueState, askable, per_statement
from queue_service.worker.suspects import Suspects

# How often a worker that runs once looks whether it is done, in seconds.
ONCE_PAUSE = 0.020
FIRST_PAUSE, MAX_PAUSE = 0.1, 0.5


class Claimer:
    """`last_pass` (monotonic) is when the loop turned last."""

    def __init__(
        self, connection: Fetcher, executors: Mapping[str, Executor], leases: Leases, finisher: Finisher,
        claimant: Claimant, *, poll_interval: timedelta, only_suspects: bool = False,
        suspects_elsewhere: Callable[[], object] | None = None,
        call_others: Callable[[str, int], object],
    ) -> None:  # fmt: skip
        self._finisher = finisher
        self._poll = poll_interval.total_seconds()
        self.states = {queue: QueueState(executor) for queue, executor in executors.items()}
        self._alarm = Alarm()
        self._pace = Pace(self._poll)
        self._claims = Claims(connection, self.states, leases, finisher, claimant, self._pace, self._alarm)
        self._looks = Looks(claimant.worker_id, self._alarm, poll=self._poll, call_others=call_others)
        self._only_suspects = only_suspects
        self._suspects = Suspects(
            self.states, self._claims, self._alarm, passed=self._passed, poll_interval=self._poll,
            elsewhere=suspects_elsewhere,
        )  # fmt: skip
        self.last_pass = time.monotonic()

    # What others report

    def wake(self) -> None:
        """There is room for more, or another reason to look."""
        self._alarm.wake()

    def enqueued(self, queue: str, priority: int, *, at_once: bool = False) -> float:
        """A notice: something was enqueued there. It is no suspect yet. With `at_once` each worker is to look, and
        otherwise the one whose turn it is. Returns for how many seconds the next ones need not be read."""
        if queue not in self.states or self._only_suspects:
            return 0.0
        # What is reserved for one of them says nothing of it in its notice.
        return self._looks.enqueued(self.states[queue], priority, at_once=at_once or queue == DELIVERIES)

    def learn(self, fleet: Fleet, asked_at: float, at: float) -> None:
        """Those that share their work with this worker, as it was between these two moments (monotonic)."""
        self._looks.learn(fleet, asked_at, at)

    def ended(self, laned: Collection[str], limited: Collection[str]) -> None:
        """A run that stood in a lane of these queues, or counted in the limit of those, is not running any more."""
        for queue in laned:
            self.states[queue].lane_freed()
        for queue in limited:
            self.states[queue].limit_freed()
        self._alarm.wake()

    def rescan(self) -> None:
        """Notices may have been lost, or claims did not go through: look everywhere."""
        self._pace.scan_now()
        self._alarm.wake()

    @property
    def is_stopping(self) -> bool:
        return self._alarm.is_stopping

    def stop(self) -> None:
        self._alarm.stop()

    # The loop

    async def run(self, service: Service, *, once: bool = False) -> None:
        """Claim until stopped; with `once`, until nothing is due and all that was claimed has ended."""
        pauses = Pauses(FIRST_PAUSE, MAX_PAUSE, jitter=random.random)
        while not self.is_stopping:
            try:
                step = self._pass_of_suspects if self._only_suspects else self._pass
                has_only_slept = await step(ONCE_PAUSE if once else self._poll)
                if has_only_slept and once and await self._is_drained():
                    return
                if not has_only_slept:
                    service.well()
                    pauses.reset()
            except Exception as lost:  # noqa: BLE001 - whatever it is, the next pass may go through
                service.failed(lost)
                self.rescan()
                await self._alarm.sleep(pauses.next())

    async def _pass(self, longest: float) -> bool:
        """One step. True if there was nothing to do but sleep."""
        now = self._passed()
        if now >= self._pace.scan_at:
            await self._scan(now)
            return False
        if self._suspects.have_a_slot_now:
            await self._suspects.run_due()
            return False
        has_claimed = False
        for limited in (False, True):
            for source in tuple(self._claims.order):
                for asked in per_statement(askable(self.states.values(), source, now, limited=limited)):
                    has_claimed = True
                    await self._claims.claim(source, asked, limited=limited)
        if self._looks.note_what_came(now):
            await self._call_others(now)
        if self._claims.has_untended_lanes:
            await self._claims.tend_lanes()
            return False
        if not has_claimed:
            await self._alarm.sleep(min(longest, self._next_look(now) - now))
        return not has_claimed

    async def _call_others(self, now: float) -> None:
        if self._pace.may_scan(now):
            # A batch that was filled says nothing of what is behind it.
            await self._scan(now)
        self._looks.call_others(now)

    async def _pass_of_suspects(self, longest: float) -> bool:
        """As `_pass`, where nothing else is claimed."""
        if await self._suspects.run_one():
            return False
        await self._alarm.sleep(longest)
        return True

    def _passed(self) -> float:
        self.last_pass = time.monotonic()
        return self.last_pass

    def _next_look(self, now: float) -> float:
        """When there is something to do that nobody reports."""
        # A time that has passed says nothing: that queue lacks a free slot, and `wake` is called when it has one.
        asked = (state.not_before for state in self.states.values() if state.may_give and state.not_before > now)
        return min([self._pace.scan_at, *asked])

    async def _scan(self, now: float) -> None:
        self._claims.hand_back_stalled(now)
        cost = await self._claims.scan()
        self._pace.scanned(time.monotonic(), cost)
        if self._suspects.are_to_be_looked_for(now):
            await self._suspects.run_due()

    async def _is_drained(self) -> bool:
        """Nothing runs, nothing is being written, and a look from the front finds nothing that is due."""
        executors_are_idle = all(state.executor.is_idle for state in self.states.values())
        if not self._finisher.is_idle or not executors_are_idle:
            return False
        if not self._only_suspects:
            if self._may_have_more():
                return False
            await self._claims.scan()
            if self._may_have_more():
                return False
        return not await self._claims.suspect_is_due(self.states.keys())

    def _may_have_more(self) -> bool:
        return any(state.may_give for state in self.states.values())
