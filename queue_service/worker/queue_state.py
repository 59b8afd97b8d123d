"""What a worker knows of one of its queues: whether it is worth a claim, from where, and from when on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from queue_service.backoff import Pauses
from queue_service.runs.queries import DuePriority, Scan, Taken
from queue_service.worker.executor import Executor
from queue_service.worker.floors import Floors

# A queue at its limit is not asked again for this long, in seconds, unless a run of it ends here.
AT_LIMIT = 0.050
# A queue from which another session is claiming within its limit is asked again after so many seconds.
CONTENDED = 0.010
# Where a rate says to wait longer, its queue is asked again after so many seconds all the same: nobody reports that a limit
# was raised or taken away.
LONGEST_WAIT = 1.0
# A claim steps over lanes that another session holds, as a sweep does for a moment. After one that came back short, a scan
# looks for what it has missed: after so many seconds at first, and at longest.
MISSED, MISSED_LONGEST = 0.050, 1.0
# Runs that one statement claims of several queues: the sweep can take a lease of so many.
MAX_CLAIM = 1_000


class Source(Enum):
    """Where the runs of a queue stand: in the queue itself, or in its lanes."""

    QUEUE = auto()
    LANES = auto()


@dataclass(slots=True, eq=False)
class QueueState:
    """`may_give` are the sources from which a claim may get something. `has_lanes` is whether it ever had some (only a scan
    looks for lanes where none were seen), and `has_limit` whether it had one when last seen. `not_before` (monotonic) is
    when a claim within the limit makes sense again, and `was_freed` whether a run of the queue has ended since the last
    such claim began. `missed` are the pauses before a scan looks for lanes that claims stepped over. `look` is one that is
    to come, since a notice came; `rank` is how many workers came before in the one under way, and `has_got` whether that
    found something."""

    executor: Executor
    floors: Floors = field(default_factory=Floors)
    may_give: set[Source] = field(default_factory=lambda: {Source.QUEUE})
    has_lanes: bool = False
    has_limit: bool = False
    not_before: float = 0.0
    was_freed: bool = False
    missed: Pauses = field(default_factory=lambda: Pauses(MISSED, MISSED_LONGEST))
    look: asyncio.TimerHandle | None = None
    rank: int = 0
    has_got: bool = False

    @property
    def name(self) -> str:
        return self.executor.queue

    def wants(self, *, ahead: bool = True) -> int:
        """How many runs to claim now; `ahead` of free slots only where no limit applies, since others could begin them."""
        self.executor.measure_speed()
        return self.executor.wants(ahead=ahead)

    # What others report

    def enqueued(self, priority: int) -> None:
        """A notice: something was enqueued. It is looked for when there is room, or once it is expected."""
        self.floors.hint(priority)
        if self.is_full:
            self.expect_all()

    @property
    def is_full(self) -> bool:
        return self.executor.wants() == 0

    @property
    def leaves_some(self) -> bool:
        """Whether there may be something that there is no room for here."""
        return bool(self.may_give) and self.is_full

    def lane_freed(self) -> None:
        """A lane can give: a run that stood in it has ended, or a scan has seen one that waits there."""
        self.has_lanes = True
        self.may_give.add(Source.LANES)

    def limit_freed(self) -> None:
        """A run that counted in the limit has ended."""
        self.not_before, self.was_freed = 0.0, True
        self.expect_all()

    def expect_all(self) -> None:
        self.may_give |= {Source.QUEUE, Source.LANES} if self.has_lanes else {Source.QUEUE}

    # What scans and claims find

    def scanned(self, scan: Scan, due: Sequence[DuePriority]) -> None:
        """`due` are the entries of this queue."""
        self.floors.scanned(scan.at, due)
        if due:
            self.may_give.add(Source.QUEUE)
        if self.name in scan.laned:
            self.lane_freed()
        else:
            self.missed.reset()
        if due or self.name in scan.laned:
            self.has_limit = self.name in scan.limited

    def claimed_within_limit(self, source: Source, taken: Taken, now: float, *, got_some: bool) -> bool:
        """Note when a claim makes sense again. False: only a scan can say more."""
        if self.name not in taken.waits:
            # Another session is claiming from it at this moment; or it is paused, or has no limit now, as a scan will find.
            self.not_before = now + CONTENDED
            self.may_give.add(source)
            return False
        wait = taken.waits[self.name]
        if wait is not None:
            self.not_before = now + min(wait, LONGEST_WAIT)
            self.may_give.add(source)
        elif not got_some and not self.was_freed:
            self.not_before = now + AT_LIMIT
        return True


class Asked(NamedTuple):
    """A queue, and how many runs a claim is to take from it."""

    state: QueueState
    runs: int


def askable(states: Iterable[QueueState], source: Source, now: float, *, limited: bool) -> list[Asked]:
    """The queues to claim from now, of those with a limit or of those without."""
    chosen = (
        state for state in states if source in state.may_give and state.has_limit is limited and state.not_before <= now
    )
    return [Asked(state, count) for state in chosen if (count := state.wants(ahead=not limited)) > 0]


def per_statement(asked: Sequence[Asked]) -> Iterator[Sequence[Asked]]:
    """What goes into one statement: one queue, or as many as want no more than MAX_CLAIM runs together."""
    together: list[Asked] = []
    size = 0
    for each in asked:
        if together and size + each.runs > MAX_CLAIM:
            yield together
            together, size = [], 0
        together.append(each)
        size += each.runs
    if together:
        yield together
