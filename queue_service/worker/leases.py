"""What this worker holds: its leases, and the runs under each.

A lease is made by one claim and covers every run that claim took. It is let go in the very statement that ends the last
of them, and never before: a running run without a lease would be found by no sweep.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from queue_service.runs.model import Run


@dataclass(slots=True, eq=False)
class Lease:
    """`outstanding` counts its runs whose outcome is not stored yet. While it is `limited`, its runs
    count in the limits of their queues."""

    id: int
    outstanding: int
    limited: bool = False
    taken_at: float = field(default_factory=time.monotonic)
    extended_at: float = field(default_factory=time.monotonic)
    lost: bool = False


class Held(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A claimed run and the lease that holds it."""

    run: Run
    lease: Lease


class Leases:
    """By id. Changed on the event loop only; the keeper's thread takes snapshots."""

    def __init__(self) -> None:
        self._by_id: dict[int, Lease] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def take(self, claimed: list[tuple[Run, int]], began: float, *, limited: bool = False) -> list[Held]:
        """The runs one claim returned, under their new lease. It is as old as the claim, which `began` (monotonic) before
        it was sent: the row's deadline can only be later than what is counted so."""
        if not claimed:
            return []
        lease = Lease(claimed[0][1], len(claimed), limited, began, began)
        self._by_id[lease.id] = lease
        return [Held(run, lease) for run, _ in claimed]

    @property
    def ids(self) -> list[int]:
        return list(self._by_id)

    def release(self, ids: Iterable[int]) -> None:
        for lease_id in ids:
            self._by_id.pop(lease_id, None)

    def lose(self, ids: Iterable[int]) -> list[Lease]:
        """These were swept. Returns those we thought we held."""
        lost = [lease for lease_id in ids if (lease := self._by_id.pop(lease_id, None)) is not None]
        for lease in lost:
            lease.lost = True
        return lost

    def due(self, age: float) -> list[Lease]:
        """Those not extended for `age` seconds. Safe from another thread."""
        limit = time.monotonic() - age
        return [lease for lease in list(self._by_id.values()) if lease.extended_at < limit]
