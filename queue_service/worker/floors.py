"""Where the claims of a queue start to look, for each of its priorities.

A drained queue leaves dead index entries at its front until vacuum may remove them, which a long transaction anywhere in
the database forbids. A claim that starts behind what was already handed out never meets them. What commits behind the
floor (a slow transaction, a run handed back) is found by the next scan, which looks from the front.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from queue_service.runs.model import Floor, Run
from queue_service.runs.queries import MAX_PRIORITIES, DuePriority

FRONT = Floor(datetime.min.replace(tzinfo=UTC), 0)

# An enqueue takes its time before it commits. A floor raised over an empty stretch stays this far behind the clock, so
# that such a run is met by the next claim and need not wait for a scan.
COMMIT_LAG = timedelta(seconds=1)


class Floors:
    """Those of one queue, for its highest MAX_PRIORITIES. What is below them has its turn when a claim has come back short,
    and the next scan lists others."""

    def __init__(self) -> None:
        self.by_priority: dict[int, Floor] = {}
        # Whether there may be something due below them.
        self.is_cut = False

    def hint(self, priority: int) -> None:
        """Something was enqueued. A priority that is new is looked at from the front."""
        if priority in self.by_priority:
            return
        if len(self.by_priority) >= MAX_PRIORITIES:
            self.is_cut = True
        if self.is_cut and self.by_priority:
            lowest = min(self.by_priority)
            if priority < lowest:
                return
            if len(self.by_priority) >= MAX_PRIORITIES:
                del self.by_priority[lowest]
        self.by_priority[priority] = FRONT

    def scanned(self, at: datetime, due: Sequence[DuePriority]) -> None:
        """Take over what a scan of this queue found at that time."""
        empty = Floor(at - COMMIT_LAG, 0)
        kept = {priority: max(floor, empty) for priority, floor in self.by_priority.items()}
        found = {each.priority: each.first for each in due}
        self.is_cut = len(found) >= MAX_PRIORITIES
        self.by_priority = found if len(kept | found) > MAX_PRIORITIES or self.is_cut else kept | found

    def claimed(self, runs: Sequence[Run]) -> None:
        """Move the floors past what was just claimed."""
        # They come in the order of execution, so of each priority the last one is left.
        for run in {run.priority: run for run in runs}.values():
            floor = Floor(run.run_at, run.id)
            if floor > self.by_priority.get(run.priority, FRONT):
                self.by_priority[run.priority] = floor
