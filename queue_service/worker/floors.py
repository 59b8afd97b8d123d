"""Where claims start to look, for each priority of each queue.

A drained queue leaves dead index entries at its front until vacuum may remove them, which a long transaction anywhere in
the database forbids. A claim that starts behind what was already handed out never meets them. What commits behind the
floor (a slow transaction, a run handed back) is found by the next scan, which looks from the front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from queue_service.runs.model import Floor, Run
from queue_service.runs.queries import Scan

FRONT = Floor(datetime.min.replace(tzinfo=UTC), 0)

# An enqueue takes its time before it commits. A floor raised over an empty stretch stays this far behind the clock, so
# that such a run is met by the next claim and need not wait for a scan.
COMMIT_LAG = timedelta(seconds=1)
# A queue with more priorities than this starts over at each scan, with those where something is due.
MAX_PRIORITIES = 64


class Floors:
    def __init__(self) -> None:
        self._queues: dict[str, dict[int, Floor]] = {}

    def of(self, queue: str) -> Mapping[int, Floor]:
        return self._queues.get(queue, {})

    def hint(self, queue: str, priority: int) -> None:
        """Something was enqueued there; a priority that is new is looked at from the front."""
        self._queues.setdefault(queue, {}).setdefault(priority, FRONT)

    def scanned(self, scan: Scan) -> set[str]:
        """Take over what a scan of every queue found. Returns the queues where something is due."""
        empty = Floor(scan.at - COMMIT_LAG, 0)
        for floors in self._queues.values():
            if len(floors) > MAX_PRIORITIES:
                floors.clear()
            for priority, floor in floors.items():
                floors[priority] = max(floor, empty)
        for due in scan.due:
            self._queues.setdefault(due.queue, {})[due.priority] = due.first
        return {due.queue for due in scan.due}

    def claimed(self, queue: str, runs: Sequence[Run]) -> None:
        """Move the floors past what was just claimed."""
        floors = self._queues.setdefault(queue, {})
        # They come in the order of execution, so of each priority the last one is left.
        for run in {run.priority: run for run in runs}.values():
            floor = Floor(run.run_at, run.id)
            if floor > floors.get(run.priority, FRONT):
                floors[run.priority] = floor
