"""How far to claim ahead of the free slots of a queue, and how much at once: what it works off within moments, as long as
that is small."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from queue_service.worker.leases import Held

# Claimed ahead is what the queue was last seen to work off in this time, and no more.
SECONDS = 0.05
MAX_RUNS, MAX_BYTES = 4_000, 8 * 1024 * 1024
# How long the speed of a queue is observed at least, where its slots are worked over quickly and where they are not.
BRISK, SLOW = 0.005, 0.2
# Payloads of a claim whose size is looked at.
SAMPLES = 8


class Ahead:
    """`runs` is how many, and `at_once` how many runs one claim may take at most: while they are read, they are there three
    times."""

    def __init__(self) -> None:
        self.runs = 0
        self.at_once = MAX_RUNS
        self._by_speed = 0
        self._measured = (time.monotonic(), 0)

    def measure(self, completed: int, *, places: int) -> None:
        """Follow the speed at which the queue is worked off: so many runs have been, on so many places."""
        then, before = self._measured
        now, ended = time.monotonic(), completed - before
        # Two slow handlers that end together are no speed: either each slot was worked twice over, or some time passed.
        if now - then < (BRISK if ended > 2 * places + 20 else SLOW):
            return
        self._measured = (now, completed)
        self._by_speed = (self._by_speed + min(MAX_RUNS, int(ended / (now - then) * SECONDS))) // 2
        self.runs = min(self._by_speed, self.at_once)

    def claimed(self, held: Sequence[Held]) -> None:
        """What comes next is taken to be as large as this."""
        sample = held[:: max(1, len(held) // SAMPLES)]
        size = sum(len(msgspec.json.encode(each.run.payload)) for each in sample) // len(sample)
        self.at_once = max(1, MAX_BYTES // max(size, 1))
        self.runs = min(self._by_speed, self.at_once)
