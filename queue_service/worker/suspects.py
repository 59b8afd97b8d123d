"""Runs that lost their worker run alone: a run that kills its worker must not take others with it (decision 0005).

Alone is a property of a process. A worker that may start another one leaves them to it (`worker/suspect_process.py`), and
goes on; that one begins nothing else, and one more only when nothing runs in it, or after a while. A worker without another
process gives them a bounded share of its own time, in which it begins nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

from queue_service.worker.claims import Claims
from queue_service.worker.pace import Alarm
from queue_service.worker.queue_state import QueueState

# For at most so many seconds a suspect waits until nothing else runs, and for at most so many it is left alone once begun.
UNTIL_IDLE = 0.5
ALONE = 1.5
# In one turn no further one is begun after so many seconds, or so many suspects; then come as many times what the turn took
# for all others.
TURN, IN_A_ROW = 0.25, 10
OTHERS = 9.0


class Suspects:
    """`passed` is called once for each suspect, as a sign that the loop turns. `elsewhere` lets a process of their own run,
    if there is to be one, and has them left to it."""

    def __init__(
        self,
        states: Mapping[str, QueueState],
        claims: Claims,
        alarm: Alarm,
        *,
        passed: Callable[[], object],
        poll_interval: float,
        elsewhere: Callable[[], object] | None = None,
    ) -> None:
        self._states = states
        self._claims = claims
        self._alarm = alarm
        self._passed = passed
        self._poll = poll_interval
        self._elsewhere = elsewhere
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
        """Claim suspects, one after the other, or see to it that they are claimed."""
        began = time.monotonic()
        self._next_look = began + self._poll
        if self._elsewhere is not None:
            if await self._claims.suspect_is_due(self._states.keys()):
                self._elsewhere()
            return
        free = self._queues_with_room()
        full, self._waiting_for_slots = self._states.keys() - free, ()
        if not await self._claims.suspect_is_due(free):
            # For one whose queue has no free slot nobody else has to wait: its turn comes when there is one.
            if full and await self._claims.suspect_is_due(full):
                self._waiting_for_slots = full
            return
        await self._until_idle(UNTIL_IDLE)
        first = time.monotonic()
        for _ in range(IN_A_ROW):
            if not await self.run_one() or time.monotonic() - first > TURN:
                break
        now = time.monotonic()
        self._next_look = now + max(self._poll, OTHERS * (now - began))

    async def run_one(self) -> bool:
        """Claim one, and leave it alone for a while. False: there is none that is due, or this worker stops."""
        if self._alarm.is_stopping:
            return False
        self._passed()
        if not await self._claims.claim_suspect(self._queues_with_room()):
            return False
        await self._until_idle(ALONE)
        return True

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
