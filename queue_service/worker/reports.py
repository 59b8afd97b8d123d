"""Stores how far runs are, as their handlers report it: the newest of each, at most once a second, all in one statement.

Reporting never waits and never fails. What could not be stored, as a run that its handler's transaction has locked, goes
with the next statement, unless something newer was reported or the handler has ended.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

from queue_service.db.execute import REFUSED
from queue_service.db.query import Query
from queue_service.errors import DatabaseUnavailable
from queue_service.logs import get_logger
from queue_service.runs import settling
from queue_service.runs.claim import Claim
from queue_service.runs.model import Run

log = get_logger(__name__)

REPORT_PERIOD = 1.0

StoredClaims = set[settling.Done]


class Reports:
    """Belongs to the event loop it is made on; `put` may be called from any thread. `is_executed` says whether the handler
    that was given a run is still at work."""

    def __init__(
        self, fetch: Callable[[Query[StoredClaims]], Awaitable[StoredClaims]], *, is_executed: Callable[[Run], bool]
    ) -> None:
        self._fetch = fetch
        self._is_executed = is_executed
        self._newest: dict[Claim, tuple[Run, str]] = {}
        self._changing = threading.Lock()
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def put(self, run: Run, progress: str) -> None:
        """`progress` is a JSON object of value and note."""
        with self._changing:
            is_first = not self._newest
            self._newest[run.claim] = (run, progress)
        if is_first:
            self._loop.call_soon_threadsafe(self._wake.set)

    async def run(self) -> None:
        """Store what is reported, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self.once()
            await asyncio.sleep(REPORT_PERIOD)

    async def once(self) -> None:
        """Store the newest of each run whose handler is at work. What was not stored goes with the next one."""
        with self._changing:
            taken, self._newest = self._newest, {}
        due = {claim: (run, progress) for claim, (run, progress) in taken.items() if self._is_executed(run)}
        if not due:
            return
        stored: StoredClaims = set()
        try:
            stored = await self._fetch(settling.report({claim: progress for claim, (_, progress) in due.items()}))
        except DatabaseUnavailable as lost:
            log.debug("cannot store progress; trying again", why=str(lost))
        except REFUSED as refused:
            log.warning("progress could not be stored", runs=len(due), error=type(refused).__name__)
            return
        with self._changing:
            self._newest = {claim: each for claim, each in due.items() if claim not in stored} | self._newest
            if self._newest:
                self._wake.set()
