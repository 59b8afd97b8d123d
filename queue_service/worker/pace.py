"""When the claimer scans, and how it sleeps between its passes.

Claims start from the floors, and follow notices and free slots. A scan from the front comes once each poll interval, and
sooner after a claim that came back short, since what commits behind a floor is seen by nothing else. A scan may cost
much (it walks what vacuum could not remove yet), so the pause after it is at least 25 times what it took the database, but
never longer than four poll intervals: promise 6.
"""

from __future__ import annotations

import asyncio

SCAN_SHARE = 25.0
LONGEST_POLLS = 4.0
# The shortest pause between two scans, in seconds.
SOON = 0.010


class Pace:
    """Times are those of `time.monotonic`."""

    def __init__(self, poll_interval: float) -> None:
        self._poll = poll_interval
        self._next_scan = 0.0
        self._earliest_scan = 0.0

    @property
    def scan_at(self) -> float:
        """When the next scan is due."""
        return max(self._next_scan, self._earliest_scan)

    def may_scan(self, now: float) -> bool:
        """Whether the cost of the last one allows another."""
        return now >= self._earliest_scan

    def scan_soon(self, not_before: float = 0.0) -> None:
        """Let the next scan come as soon as the cost of the last one allows, but not earlier than that."""
        self._next_scan = min(self._next_scan, max(self._earliest_scan, not_before))

    def scan_now(self) -> None:
        """Let the next scan come at once, whatever the last one has cost."""
        self._next_scan = self._earliest_scan = 0.0

    def scanned(self, ended: float, cost: float) -> None:
        """A scan is over, which the database has worked on for `cost` seconds. What was waited for (a lock, the network) is
        none."""
        self._earliest_scan = ended + min(max(SOON, cost * SCAN_SHARE), LONGEST_POLLS * self._poll)
        self._next_scan = ended + self._poll


class Alarm:
    """The sleep of a loop that others may end: because there is something to do, or for good."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.is_stopping = False

    def wake(self) -> None:
        self._event.set()

    def stop(self) -> None:
        self.is_stopping = True
        self._event.set()

    async def sleep(self, seconds: float) -> None:
        """Until `wake` or `stop`, and for so many seconds at most."""
        if not self.is_stopping:
            self._event.clear()
        try:
            async with asyncio.timeout(max(seconds, 0)):
                await self._event.wait()
        except TimeoutError:
            pass
