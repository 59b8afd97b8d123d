"""Which of the idle workers looks first when a notice comes, so that not all of them ask for one run.

Workers with the same queues and tasks are a fleet, and each knows the ids of the others from the roster. Their order
moves on with each slice of the database's clock, and all compute it alike, so they need not talk. The first looks at
once. The second looks a moment later, and finds what a first one that is dead, blocked or full has left. The others look
the later, the further behind they are and the more often they found nothing; while notices come one upon the other, they
do not even read them. All this is about milliseconds: whatever nobody has looked for is found by the poll.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection

# For so many seconds the order stays as it is.
SLICE = 0.030
# When the second looks, and by how much later each one behind it does.
SECOND, STEP = 0.003, 0.005
# By what these times grow at most, where looks were in vain: that of the second, and those of the others. A look that is
# put off serves all the notices that come meanwhile.
MOST_OF_SECOND, MOST = 4, 64
# One that has begun a run in this slice lets the second one, which has perhaps none, go first.
AFTER_SECOND = SECOND * (MOST_OF_SECOND + 1)
# Whoever hears within STREAM seconds of two notices that are for others reads no more of them until its turn comes, or for
# REST seconds.
STREAM, REST = 0.1, 0.030


class Precedence:
    """Times are those of `time.monotonic`, in seconds. A worker that knows of no other is always the first."""

    def __init__(self, worker_id: int) -> None:
        self._id = worker_id
        self._place, self._size = 0, 1
        # What is to be added to the monotonic clock to have the database's: at least, at most, and taken.
        self._least, self._most, self._offset = -math.inf, math.inf, 0.0
        self._of_second = self._factor = 1
        self._begun_in: int | None = None
        # When a notice came that was for others.
        self._put_off_at = -math.inf

    @property
    def is_alone(self) -> bool:
        return self._size == 1

    def learn(self, fleet: Collection[int], database_time: float, asked_at: float, now: float) -> None:
        """The workers of the fleet that live, and what the database's clock said between these two moments."""
        others = sorted({*fleet} - {self._id})
        self._place, self._size = bisect.bisect(others, self._id), len(others) + 1
        # Each answer narrows down what is known, until the clocks have drifted apart.
        least, most = database_time - now, database_time - asked_at
        self._least, self._most = max(self._least, least), min(self._most, most)
        if self._least > self._most:
            self._least, self._most = least, most
        self._offset = (self._least + self._most) / 2

    def rank(self, now: float) -> int:
        """How many come first: 0 is the first."""
        return (self._place - self._slice(now)) % self._size

    def delay(self, rank: int, now: float, *, is_idle: bool) -> float:
        """How long one of this rank waits before it looks."""
        if self.is_alone:
            return 0.0
        if rank == 0:
            return 0.0 if is_idle or self._begun_in != self._slice(now) else AFTER_SECOND
        if rank == 1:
            return SECOND * self._of_second
        return (SECOND + STEP * (rank - 1)) * self._factor

    def rest(self, now: float) -> float:
        """After a notice: for how long those that come next need not be read."""
        rank, before = self.rank(now), self._put_off_at
        if rank < 2:
            return 0.0
        self._put_off_at = now
        to_its_turn = (rank - 1) * SLICE - (now + self._offset) % SLICE
        return min(REST, to_its_turn) if now - before < STREAM else 0.0

    def looked(self, rank: int, now: float, *, found: bool) -> None:
        """One of this rank has looked, and got something or nothing."""
        if found:
            self._begun_in = self._slice(now)
        if rank == 1:
            # By halves: that the first was slow once says little.
            self._of_second = max(self._of_second // 2, 1) if found else min(2 * self._of_second, MOST_OF_SECOND)
        elif rank > 1:
            self._factor = max(self._factor // 2, 1) if found else min(2 * self._factor, MOST)

    def _slice(self, now: float) -> int:
        return int((now + self._offset) / SLICE)
