"""Whether this worker looks for a run that was enqueued, and when: at once, a little later, or only if nobody else does.

What comes of a look is noted once the claims for it are back. A worker that leaves something for which it has no room calls
the others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from queue_service.roster.queries import Fleet
from queue_service.worker.pace import Alarm
from queue_service.worker.precedence import Precedence
from queue_service.worker.queue_state import QueueState

# All workers are called no more often than this, in seconds, by one of them.
CALL_PAUSE = 0.050


class Looks:
    """`call_others` is given a queue and a priority."""

    def __init__(self, worker_id: int, alarm: Alarm, *, poll: float, call_others: Callable[[str, int], object]) -> None:
        self.precedence = Precedence(worker_id)
        self._alarm = alarm
        self._poll = poll
        self._call_others = call_others
        # The queues that are looked at because of a notice, and those that were full after that.
        self._under_way: dict[str, QueueState] = {}
        self._full: list[QueueState] = []
        self._next_call = 0.0

    def learn(self, fleet: Fleet, asked_at: float, at: float) -> None:
        """Those that share their work with this worker, as it was between these two moments (monotonic)."""
        self.precedence.learn(fleet.ids, fleet.time, asked_at, at)

    def enqueued(self, state: QueueState, priority: int, *, at_once: bool) -> float:
        """A notice. With `at_once` every worker is to look. Returns for how many seconds the next ones need not be read."""
        state.enqueued(priority)
        now = time.monotonic()
        rank = 0 if at_once else self.precedence.rank(now)
        delay = 0.0 if at_once else self.precedence.delay(rank, now, is_idle=state.executor.is_idle)
        loop = asyncio.get_running_loop()
        if delay == 0.0:
            self._begin(state, rank)
        elif delay < self._poll and (state.look is None or state.look.when() > loop.time() + delay):
            self._look_later(state, delay, rank)
        return 0.0 if at_once else self.precedence.rest(now)

    def note_what_came(self, now: float) -> bool:
        """After the claims. Whether there may be something for which there is no room here, so that the others are to be
        called."""
        under_way, self._under_way = self._under_way, {}
        self._full = []
        for state in under_way.values():
            self.precedence.looked(state.rank, now, found=state.has_got)
            # Where the first is full and has got nothing, the second comes.
            if state.leaves_some and (state.rank or state.has_got):
                self._full.append(state)
            state.rank = 0
        if now < self._next_call:
            for state in self._full:
                self._look_later(state, self._next_call - now)
            self._full = []
        return bool(self._full)

    def call_others(self, now: float) -> None:
        """Where there still may be something."""
        for state in self._full:
            if state.leaves_some:
                self._next_call = now + CALL_PAUSE
                self._call_others(state.name, max(state.floors.by_priority, default=0))

    def _look_later(self, state: QueueState, delay: float, rank: int = 1) -> None:
        """In place of the look that was to come."""
        if state.look is not None:
            state.look.cancel()
        state.look = asyncio.get_running_loop().call_later(delay, self._begin, state, rank)

    def _begin(self, state: QueueState, rank: int) -> None:
        if state.look is not None:
            state.look.cancel()
            state.look = None
        state.rank, state.has_got = rank, False
        state.expect_all()
        if not self.precedence.is_alone:
            self._under_way[state.name] = state
        self._alarm.wake()
