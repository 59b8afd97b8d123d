"""Runs that lost their worker run alone: a run that kills its worker must not take others with it.

They go one at a time, when nothing else runs in this process. Ordinary runs then get at least as long a turn. Both waits
have a bound, after which a suspect shares the process like any other run (decision 0005).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

from queue_service.worker.claims import Claims
from queue_service.worker.pace import Alarm
from queue_service.worker.queue_state import QueueState

# For at most so many seconds a suspect waits until nothing else runs, and for at most so many it is left alone once begun.
UNTIL_IDLE = 1.0
ALONE = 2.0
# Suspects in a row before ordinary runs get their turn.
IN_A_ROW = 20


class Suspects:
    """`passed` is called once for each suspect, as a sign that the loop turns."""

    def __init__(
        self,
        states: Mapping[str, QueueState],
        claims: Claims,
        alarm: Alarm,
        *,
        passed: Callable[[], object],
        poll_interval: float,
    ) -> None:
        self._states = states
        self._claims = claims
        self._alarm = alarm
        self._passed = passed
        self._poll = poll_interval
        self._next_look = 0.0
        # Queues that had no free slot when suspects of some of them were due.
        self._waiting_for_slots: Collection[str] = ()

    @property
    def have_a_slot_now(self) -> bool:
        """Whether a queue whose suspects waited for a free slot has one."""
        return any(self._states[queue].wants() > 0 for queue in self._waiting_for_slots)

    def are_to_be_looked_for(self, now: float) -> bool:
        return now >= self._next_look

    async def run_due(self) -> None:
        """Claim suspects, one after the other."""
        began = time.monotonic()
        self._next_look = began + self._poll
        free = self._queues_with_room()
        full, self._waiting_for_slots = self._states.keys() - free, ()
        if not await self._claims.suspect_is_due(free):
            # For one whose queue has no free slot nobody else has to wait: its turn comes when there is one.
            if full and await self._claims.suspect_is_due(full):
                self._waiting_for_slots = full
            return
        await self._until_idle(UNTIL_IDLE)
        for _ in range(IN_A_ROW):
            if self._alarm.is_stopping:
                return
            self._passed()
            if not await self._claims.claim_suspect(self._queues_with_room()):
                break
            await self._until_idle(ALONE)
        now = time.monotonic()
        self._next_look = now + max(self._poll, now - began)

    def _queues_with_room(self) -> list[str]:
        return [name for name, state in self._states.items() if state.wants() > 0]

    async def _until_idle(self, seconds: float) -> None:
        """Until nothing runs in this process, but no longer than so."""
        deadline = time.monotonic() + seconds
        while not all(state.executor.is_idle for state in self._states.values()):
            left = deadline - time.monotonic()
            if left <= 0 or self._alarm.is_stopping:
                return
            await self._alarm.sleep(left)
