"""The right to run a deployment's child: one process has it at a time, and knows in time when it may have it no longer.

The database decides, by its clock. Here the lease counts from the moment at which its last renewal was sent, and is shorter
by a tenth, in which the child is ended: another is not begun before. From then on it is not sure whose it is, until a
renewal goes through (nobody had taken it) or finds that it is another's.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

from queue_service.db.execute import NOT_EXECUTED, cancellable
from queue_service.db.query import Fetch
from queue_service.deployments import queries
from queue_service.errors import DeploymentHeld
from queue_service.logs import get_logger
from queue_service.services.loop import Service

log = get_logger(__name__)

# How often whoever waits for a deployment looks, at least and at most, in seconds.
FIRST_LOOK, LAST_LOOK = 0.05, 0.5
# What of a lease counts here.
SURE = 0.9
# A process that ends does not wait longer than this, in seconds, to let go: the lease lapses by itself.
RELEASE_SECONDS = 2.0


class Lease:
    """`lapsed` is called once with a sentence, when it is not sure any more, or lost; `wanted` whenever another asks for
    it."""

    def __init__(
        self,
        fetch: Fetch,
        deployment: str,
        owner: str,
        length: timedelta,
        *,
        lapsed: Callable[[str], None],
        wanted: Callable[[], None],
    ) -> None:
        self._fetch = fetch
        self._deployment = deployment
        self._owner = owner
        self._length = length
        self._lapsed = lapsed
        self._wanted = wanted
        self._holding = uuid.uuid4().hex
        self._log = log.bind(deployment=deployment)
        # (monotonic) Until when it is surely ours.
        self._until = 0.0
        self._has_lapsed = False
        self._is_lost = False
        self._news = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    async def take(self, wait: float | None) -> None:
        """Take it; where another has it, ask for it and wait for so many seconds (None: without an end; 0: do neither).
        Raises DeploymentHeld."""
        give_up_at = None if wait is None else time.monotonic() + wait
        while True:
            began = time.monotonic()
            holder = await self._fetch(
                queries.hold(self._deployment, self._owner, self._holding, self._length, ask=wait != 0)
            )
            if holder is not None and holder.is_ours:
                self._until = began + SURE * self._length.total_seconds()
                return
            if holder is not None and give_up_at is not None and time.monotonic() >= give_up_at:
                raise DeploymentHeld(self._deployment, holder.owner)
            pause = LAST_LOOK if holder is None else min(max(holder.seconds_left, FIRST_LOOK), LAST_LOOK)
            if give_up_at is not None:
                pause = min(pause, max(give_up_at - time.monotonic(), FIRST_LOOK))
            await asyncio.sleep(pause)

    async def keep(self, service: Service) -> None:
        """Renew it for as long as it is ours."""
        self._watch()
        third = self._length.total_seconds() / 3
        pause = third
        while True:
            await asyncio.sleep(pause)
            began = time.monotonic()
            try:
                # A busy pool is waited for as long as there is time: who asks anew waits from the end of the queue.
                async with asyncio.timeout(max(third, self._until - began)):
                    with cancellable():
                        wanted = await self._fetch(queries.renew(self._deployment, self._holding, self._length))
            except (TimeoutError, *NOT_EXECUTED) as lost:
                service.failed(lost)
                pause = min(third, LAST_LOOK)
                continue
            service.well()
            pause = third
            if wanted is None:
                self._lose()
                return
            self._until = began + SURE * self._length.total_seconds()
            self._watch()
            self._wake()
            if wanted:
                self._wanted()

    @property
    def is_sure(self) -> bool:
        """Whether it is ours at this moment."""
        return not self._is_lost and time.monotonic() < self._until

    async def is_ours(self) -> bool:
        """As `is_sure`, once that is known: during an outage this waits for its end."""
        while not self._is_lost and time.monotonic() >= self._until:
            await self._news.wait()
        return not self._is_lost

    async def release(self) -> None:
        """Let another have it, at once if the database can be reached."""
        if self._timer is not None:
            self._timer.cancel()
        if self._is_lost:
            return
        with contextlib.suppress(TimeoutError, *NOT_EXECUTED):
            async with asyncio.timeout(RELEASE_SECONDS):
                await self._fetch(queries.release(self._deployment, self._holding))

    def _watch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        left = self._until - time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(max(left, 0.0), self._look_whether_it_lapsed)

    def _look_whether_it_lapsed(self) -> None:
        if not self.is_sure:
            self._end("its supervisor could not renew the deployment's lease in time")

    def _lose(self) -> None:
        self._is_lost = True
        self._wake()
        self._end("another process has taken the deployment over")

    def _end(self, why: str) -> None:
        if not self._has_lapsed:
            self._has_lapsed = True
            self._log.error("the lease of a deployment is over", why=why)
            self._lapsed(why)

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
