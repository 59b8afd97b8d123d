"""`app.queues`: what holds for all runs of a queue, whichever worker claims from it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from queue_service.app import enqueue as enqueueing
from queue_service.app.core import Core
from queue_service.db import channels
from queue_service.db.execute import fetch
from queue_service.errors import ConfigError
from queue_service.logs import get_logger
from queue_service.queues import queries
from queue_service.queues.queries import Queue, QueueLimits
from queue_service.runs import queries as runs
from queue_service.tasks import duration
from queue_service.words import check_word

log = get_logger(__name__)

# Rows that one statement of a purge forgets, and of lanes that it changes.
PURGE_BATCH, LANES_BATCH = 5_000, 1_000
# How long lanes that others hold are waited for, in seconds.
WIDEN_SECONDS = 10.0
MAX_LIMIT = 1_000_000


class Queues:
    """Queues need not be made: one is there as soon as a run names it."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def list(self, *, conn: Any = None) -> list[Queue]:
        """Return the queues that hold runs, and those about which something was set."""
        return await self._core.fetch(queries.listed(), conn)

    async def pause(self, queue: str, *, until: datetime | timedelta | float | None = None, conn: Any = None) -> bool:
        """Let no worker claim from this queue until `resume`, or until a time, or for so long (seconds or timedelta, by
        the database's clock). What is running goes on. Returns False if it was paused already, and for as long. Raises
        ConfigError for a time that has passed, or has no time zone. With `conn` it is part of the caller's transaction."""
        check_word(queue, "queue", enqueueing.MAX_QUEUE)
        if isinstance(until, datetime):
            enqueueing.check_moment(until, "until")
            paused = await self._core.fetch(queries.pause(queue, until=until), conn)
        else:
            lasting = None if until is None else duration(until, "until", positive=True)
            paused = await self._core.fetch(queries.pause(queue, lasting=lasting), conn)
        if paused is None:
            raise ConfigError(f"until={until} has passed, by the database's clock. Nothing was changed.")
        return paused

    async def resume(self, queue: str, *, conn: Any = None) -> bool:
        """Let workers claim from this queue again. Returns False if it was not paused. With `conn` it is part of the
        caller's transaction."""
        resumed = await self._core.fetch(queries.resume(queue), conn)
        if resumed:
            await self._core.announce([channels.enqueued(queue, 0)], conn)
        return resumed

    async def purge(self, queue: str, *, on_progress: Callable[[int], object] | None = None, conn: Any = None) -> int:
        """Forget all that is queued in this queue, now or for later; what is running goes on. Returns how many runs went.
        It is done in batches, and `on_progress` is called with the count after each. With `conn` all of them are part of
        the caller's transaction."""
        count = 0
        while gone := await self._core.fetch(runs.purge(queue, limit=PURGE_BATCH), conn):
            count += gone
            if on_progress is not None:
                on_progress(count)
        return count

    async def limit(
        self,
        queue: str,
        *,
        max_running: int | None = None,
        max_running_per_key: int | None = None,
        rate: int | None = None,
        period: timedelta | float = 1.0,
        burst: int | None = None,
    ) -> bool:
        """Set what this queue is limited to, wherever its runs are claimed; what is not given is not limited.

        `max_running` of its runs go on at once, and `max_running_per_key` of those with the same ordering key (1: strictly
        in order, which is also what holds without it). `rate` of its runs may begin in each `period` (seconds or
        timedelta), evenly; what was not used is saved up for `burst` of them (`rate`) to begin at once. What is running
        goes on, and counts. Returns False if these were its limits already.

        Raises ConfigError for what is no limit, and DatabaseUnavailable where another transaction does not let go of the
        leases; then nothing changed.
        """
        check_word(queue, "queue", enqueueing.MAX_QUEUE)
        counts = {"max_running": max_running, "max_running_per_key": max_running_per_key, "rate": rate, "burst": burst}
        for what, count in counts.items():
            _check_count(count, what)
        if burst is not None and rate is None:
            raise ConfigError("burst says how many may begin at once of those that a rate lets begin. Pass rate=, too.")
        length = duration(period, "period", positive=True)
        limits = QueueLimits(
            max_running, max_running_per_key, rate, None if rate is None else length, rate and (burst or rate)
        )
        changed = await self._store(queue, limits)
        await self._widen(queue, max_running_per_key or 1)
        if changed:
            self._core.notify([channels.enqueued(queue, 0)])
        return changed

    async def _store(self, queue: str, limits: QueueLimits) -> bool:
        async with self._core.opened.pool.connection() as conn, conn.transaction():
            if limits.max_running is not None:
                # Claims that began before they could see the limit are over then, and what they took counts too. No claim
                # or ending gets in meanwhile, so it is better to give up than to stand in their way. (It takes Postgres a
                # second to find that it waits for its own vacuum, and to end that.)
                await conn.execute("set local lock_timeout = '2s'")
                await fetch(conn, queries.await_claims())
                await fetch(conn, queries.count_all())
            return await fetch(conn, queries.limit(queue, limits))

    async def _widen(self, queue: str, width: int) -> None:
        """Let lanes that exist know how many of their runs go on at once."""
        deadline = time.monotonic() + WIDEN_SECONDS
        while await self._core.fetch(queries.widen(queue, width, limit=LANES_BATCH)):
            if time.monotonic() > deadline:
                log.warning(
                    "another transaction holds lanes of a queue: until they are empty, no more of their runs go on at "
                    "once than before", queue=queue,
                )  # fmt: skip
                return
            await asyncio.sleep(0.01)


def _check_count(count: int | None, what: str) -> None:
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_LIMIT):
        raise ConfigError(
            f"{what} must be a whole number from 1 to {MAX_LIMIT:,}, not {count!r}. To let nothing begin, pause the queue."
        )
