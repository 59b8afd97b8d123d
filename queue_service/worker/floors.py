"""Where the claims of a queue start to look, for each of its priorities.

A drained queue leaves dead index entries at its front until vacuum may remove them, which a long transaction anywhere in
the database forbids. A claim that starts behind what was already handed out never meets them. What commits behind the
floor (a slow transaction, a run handed back) is found by the next scan, which looks from the front.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from queue_service.runs.model import Floor, Run
from queue_service.runs.queries import DuePriority

FRONT = Floor(datetime.min.replace(tzinfo=UTC), 0)

# An enqueue takes its time before it commits. A floor raised over an empty stretch stays this far behind the clock, so
# that such a run is met by the next claim and need not wait for a scan.
COMMIT_LAG = timedelta(seconds=1)
# A queue with more priorities than this starts over at each scan, with those where something is due.
MAX_PRIORITIES = 64


class Floors:
    """Those of one queue."""

    def __init__(self) -> None:
        self.by_priority: dict[int, Floor] = {}

    def hint(self, priority: int) -> None:
        """Something was enqueued. A priority that is new is looked at from the front."""
        self.by_priority.setdefault(priority, FRONT)

    def scanned(self, at: datetime, due: Sequence[DuePriority]) -> None:
        """Take over what a scan of this queue found at that time."""
        if len(self.by_priority) > MAX_PRIORITIES:
            self.by_priority.clear()
        empty = Floor(at - COMMIT_LAG, 0)
        for priority, floor in self.by_priority.items():
            self.by_priority[priority] = max(floor, empty)
        for each in due:
            self.by_priority[each.priority] = each.first

    def claimed(self, runs: Sequence[Run]) -> None:
        """Move the floors past what was just claimed."""
        # They come in the order of execution, so of each priority the last one is left.
        for run in {run.priority: run for run in runs}.values():
            floor = Floor(run.run_at, run.id)
            if floor > self.by_priority.get(run.priority, FRONT):
                self.by_priority[run.priority] = floor
