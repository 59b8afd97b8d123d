"""Waiting for turns to end: watch the stream, then look, then wait for a wakeup of the stream, with the poll as the floor.

It needs no worker: a turn whose deadline has passed is ended here, by the election that any sweep would hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from queue_service.db.query import Query
from queue_service.errors import DatabaseUnavailable, SchemaMismatch, TurnUnknown
from queue_service.logs import get_logger
from queue_service.services.fanout import QUIET_POLLS, Fanout
from queue_service.turns import queries
from queue_service.turns.model import Outcome, Standing
from queue_service.turns.queries import Key

log = get_logger(__name__)

# A deadline that is about to pass is not looked at more often than this, in seconds.
BREATH = 0.05


class Outcomes:
    """`grace` is for how long, in seconds, nothing is ended here after an outage: nobody could extend a turn in it, and
    whoever still lives is to have the first word."""

    def __init__(
        self, fetch: Callable[[Query[Any]], Awaitable[Any]], fanout: Fanout, *, poll_interval: float, grace: float
    ) -> None:
        self._fetch = fetch
        self._fanout = fanout
        self._poll_interval = poll_interval
        self._grace = grace

    async def wait(self, key: Key) -> Outcome:
        """How the turn ended. Waits for ever, through outages too: the caller brings the deadline. Raises TurnUnknown."""
        standing = await self._first_look(key)
        if standing.outcome is not None:
            return standing.outcome
        spared_until = 0.0
        with self._fanout.watch(standing.stream) as tail:
            while True:
                # Taken before the look: what ends between the two wakes it.
                wakeup = tail.ended_turns.next()
                try:
                    standing = await self._look(key, may_end=time.monotonic() >= spared_until)
                except (DatabaseUnavailable, SchemaMismatch) as lost:
                    self._fanout.check()
                    log.debug("cannot look for a turn's ending; trying again", why=str(lost))
                    spared_until = time.monotonic() + self._grace
                if standing.outcome is not None:
                    return standing.outcome
                await _at_most(self._pause(standing), self._fanout.woken(wakeup))

    async def _first_look(self, key: Key) -> Standing:
        while True:
            try:
                return await self._standing(key)
            except (DatabaseUnavailable, SchemaMismatch) as lost:
                self._fanout.check()
                log.debug("cannot look for a turn; trying again", why=str(lost))
                await asyncio.sleep(self._poll_interval)

    async def _look(self, key: Key, *, may_end: bool) -> Standing:
        """How the turn stands, once it was ended here if it has lapsed."""
        standing = await self._standing(key)
        if standing.outcome is None and standing.seconds_left is not None and standing.seconds_left <= 0 and may_end:
            await self._fetch(queries.sweep_one(*key))
            standing = await self._standing(key)
        return standing

    async def _standing(self, key: Key) -> Standing:
        standing: Standing | None = await self._fetch(queries.standing(*key))
        if standing is None:
            raise TurnUnknown(*key)
        return standing

    def _pause(self, standing: Standing) -> float:
        """How long to wait for a wakeup before looking again: until the turn may have lapsed, if its deadline has not moved
        by then. And not for ever: a notice causes it, and a lost one is not always made good by looking at streams."""
        left = standing.seconds_left
        if left is None or left <= 0:
            return self._poll_interval
        return min(max(left, BREATH), QUIET_POLLS * self._poll_interval)


async def _at_most(seconds: float, wakeup: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await wakeup
