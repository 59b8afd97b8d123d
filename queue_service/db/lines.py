"""Whose turn it is to have a connection: first come, first served, in each line.

Each queue has a line, so that the blocks of one keep nobody waiting in another. A block inside of another block does not
wait in that line: all who are served there could be waiting in it for a second one. It stands in a line of its own run,
behind blocks that are as deep inside as itself, and so the one that is deepest inside always comes to its end.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from enum import Enum, auto
from typing import Protocol, cast

from queue_service.errors import ClaimLost
from queue_service.logs import running

Claim = tuple[int, int]


class Borrower(Protocol):
    """A run, as far as it matters here."""

    @property
    def id(self) -> int: ...
    @property
    def attempt(self) -> int: ...
    @property
    def task(self) -> str: ...
    @property
    def queue(self) -> str: ...
    @property
    def cancelled(self) -> bool: ...


class Stage(Enum):
    WAITING = auto()
    # It is served, and its connection is being made ready.
    OPENING = auto()
    HOLDING = auto()
    OVER = auto()


class Ticket:
    """The place of one block in its line. `granted` is done once it is served; or with False, once its run is not its
    handler's any more."""

    __slots__ = ("granted", "line", "run", "since", "stage", "stopped")

    def __init__(self, run: Borrower, line: _Line) -> None:
        self.run = run
        self.line = line
        self.stage = Stage.WAITING
        self.granted: Future[bool] = Future()
        # Set when its run is stopped.
        self.stopped = threading.Event()
        self.since = time.monotonic()

    @property
    def claim(self) -> Claim:
        return self.run.id, self.run.attempt


class _Line:
    __slots__ = ("limit", "served", "waiting")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.served = 0
        self.waiting: deque[Ticket] = deque()


# The blocks that this code is inside of.
_inside: contextvars.ContextVar[tuple[Ticket, ...]] = contextvars.ContextVar("queue_service_inside", default=())


class Lines:
    """May be used from any thread. `limit_of` says how many of a queue are served at once. `on_wait` is called, from any
    thread and without waiting for anything, when a run begins to wait for others, or for the database, and when it no
    longer does. It does not wait for others while it has a connection itself."""

    def __init__(self, limit_of: Callable[[str], int], *, on_wait: Callable[[Borrower, bool], None]) -> None:
        self._limit_of = limit_of
        self._on_wait = on_wait
        self._changing = threading.Lock()
        self._lines: dict[Hashable, _Line] = {}
        self._tickets: dict[Claim, list[Ticket]] = {}
        self._are_waiting: set[Claim] = set()

    def ask(self, run: Borrower) -> Ticket:
        """Begin to wait. Raises ClaimLost for a run that is not its handler's any more."""
        with self._changing:
            # Under the lock, since `stop` looks for tickets only once the run is marked.
            if run.cancelled:
                raise ClaimLost(run.id, run.attempt)
            line = self._line(run)
            ticket = Ticket(run, line)
            self._tickets.setdefault(ticket.claim, []).append(ticket)
            line.waiting.append(ticket)
            self._note(ticket)
            self._serve(line)
        return ticket

    def hold(self, ticket: Ticket) -> None:
        """Its connection is ready, and used by the code that calls this."""
        with self._changing:
            if ticket.stage is Stage.OPENING:
                ticket.stage = Stage.HOLDING
                self._note(ticket)
        _inside.set((*(each for each in _inside.get() if each.stage is Stage.HOLDING), ticket))

    def leave(self, ticket: Ticket) -> None:
        """It needs nothing any more, or never got it. Any number of times."""
        with self._changing:
            if ticket.stage is Stage.OVER:
                return
            if ticket.stage is not Stage.WAITING:
                ticket.line.served -= 1
            elif ticket in ticket.line.waiting:
                ticket.line.waiting.remove(ticket)
            ticket.stage = Stage.OVER
            tickets = self._tickets[ticket.claim]
            tickets.remove(ticket)
            self._note(ticket)
            self._serve(ticket.line)
            if not tickets:
                del self._tickets[ticket.claim]
            self._lines = {key: line for key, line in self._lines.items() if line.served or line.waiting}

    def stop(self, claim: Claim) -> list[Ticket]:
        """The run of this claim is not its handler's any more: nothing of it waits from now on. Returns what it has."""
        with self._changing:
            tickets = list(self._tickets.get(claim, ()))
            for ticket in tickets:
                ticket.stopped.set()
                if ticket.stage is Stage.WAITING:
                    if ticket in ticket.line.waiting:
                        ticket.line.waiting.remove(ticket)
                    if ticket.granted.set_running_or_notify_cancel():
                        ticket.granted.set_result(False)
            return [ticket for ticket in tickets if ticket.stage is Stage.HOLDING]

    def count(self) -> tuple[int, int]:
        """How many have a connection, or are getting it, and how many wait for their turn."""
        with self._changing:
            tickets = [ticket for tickets in self._tickets.values() for ticket in tickets]
        waiting = sum(ticket.stage is Stage.WAITING for ticket in tickets)
        return len(tickets) - waiting, waiting

    def _line(self, run: Borrower) -> _Line:
        depth = sum(ticket.stage is Stage.HOLDING for ticket in _inside.get())
        if not depth and running.get() is not cast("object", run) and self._has_one(run):
            # A thread that a handler has started does not know which blocks it is inside of.
            depth = 1
        key: Hashable = ((run.id, run.attempt), depth) if depth else run.queue
        if key not in self._lines:
            self._lines[key] = _Line(1 if depth else max(1, self._limit_of(run.queue)))
        return self._lines[key]

    def _has_one(self, run: Borrower) -> bool:
        return any(ticket.stage is Stage.HOLDING for ticket in self._tickets.get((run.id, run.attempt), ()))

    def _serve(self, line: _Line) -> None:
        while line.waiting and line.served < line.limit:
            ticket = line.waiting.popleft()
            # One whose waiter was cancelled at this moment leaves by itself.
            if ticket.granted.set_running_or_notify_cancel():
                line.served += 1
                ticket.stage = Stage.OPENING
                self._note(ticket)
                ticket.granted.set_result(True)

    def _note(self, ticket: Ticket) -> None:
        stages = {each.stage for each in self._tickets.get(ticket.claim, ())}
        waits = Stage.OPENING in stages or (Stage.WAITING in stages and Stage.HOLDING not in stages)
        if waits != (ticket.claim in self._are_waiting):
            (self._are_waiting.add if waits else self._are_waiting.discard)(ticket.claim)
            self._on_wait(ticket.run, waits)
