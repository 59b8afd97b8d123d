"""What one statement writes of what has ended: runs with their outcomes, or returns, and the leases they were under."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from queue_service.db.query import Query
from queue_service.runs import settling
from queue_service.runs.model import Ending, Return
from queue_service.turn import IN_METADATA
from queue_service.worker.leases import Held
from queue_service.worker.tally import Settlement

# As the statements that make deliveries spell it.
DELIVERIES = "thread_response"

Entry = tuple[Held, Settlement | None]


@dataclass(slots=True)
class Group:
    """What one statement writes: endings, with runs that have ended already and only let go of their lease, or returns."""

    entries: Sequence[Entry]
    outcomes: list[Any] = field(init=False)
    # A write that failed may have been done all the same; then its claims are found gone, and are not lost.
    uncertain: bool = False
    # What the database refused of it is not in it any more.
    is_bare: bool = False
    # What writes it, once that is known.
    prepared: Query[set[settling.Done]] | None = None

    def __post_init__(self) -> None:
        self.hold(self.entries)

    def hold(self, entries: Sequence[Entry]) -> None:
        """These are in it from now on."""
        self.entries = entries
        self.outcomes = [outcome for _, outcome in entries if outcome is not None]
        self.prepared = None

    def handed_back(self) -> dict[str, int]:
        """The queues to which runs go back that are due, with the highest priority of these."""
        priorities: dict[str, int] = {}
        if self.outcomes and isinstance(self.outcomes[0], Return):
            for held, outcome in self.entries:
                if isinstance(outcome, Return) and outcome.delay is None:
                    queue, priority = held.run.queue, held.run.priority
                    priorities[queue] = max(priority, priorities.get(queue, priority))
        return priorities

    def query(self, worker_id: int, freed: Collection[int]) -> Query[set[settling.Done]]:
        """The statement, which also lets go of these leases: those are not known before it is sent."""
        if self.prepared is None:
            write: Callable[..., Query[set[settling.Done]]] = settling.finish
            if self.outcomes and isinstance(self.outcomes[0], Return):
                write = settling.give_back
            elif self.outcomes and self.outcomes[0].handed_on:
                write = settling.hand_on
            self.prepared = write(self.outcomes, worker_id=worker_id)
        return settling.freeing(self.prepared, freed)


def by_kind(entries: Sequence[Entry]) -> list[Group]:
    """One group for each statement. Turns and deliveries go apart: an ending of a turn locks the lane of its delivery, and
    then the run's own. Who locked lanes of both kinds in another order would deadlock with it."""
    # A comprehension, since a call for each run would cost more than all the rest of this.
    if not [
        entry
        for entry in entries
        if type(entry[1]) is Return or entry[0].run.metadata is not None or entry[0].run.queue == DELIVERIES
    ]:
        return [Group(entries)] if entries else []
    groups: dict[tuple[bool, ...], list[Entry]] = {}
    for entry in entries:
        held, outcome = entry
        kind = (
            isinstance(outcome, Return),
            isinstance(outcome, Ending) and outcome.handed_on,
            IN_METADATA in (held.run.metadata or ()),
            held.run.queue == DELIVERIES,
        )
        groups.setdefault(kind, []).append(entry)
    return [Group(groups[kind]) for kind in sorted(groups)]
