"""Waiting for runs to end: subscribe, then read, then wait for notices, with the poll as the floor.

One subscription and one poll serve every waiter of the process, and end where nobody has waited for a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from datetime import timedelta

from queue_service.db import channels
from queue_service.db.execute import NOT_EXECUTED
from queue_service.db.listener import Listener, NoticesMissed
from queue_service.db.meaning import is_forbidden
from queue_service.db.query import Query
from queue_service.errors import DatabaseUnavailable
from queue_service.runs import queries
from queue_service.runs.model import RunState
from queue_service.services.loop import Service, Services, every

EndingFuture = asyncio.Future[RunState | None]

NOTICES_SERVICE, POLLS_SERVICE = "notices of endings", "polls of endings"
# For so many polls without anybody who waits they go on.
QUIET_POLLS = 10


class Endings:
    def __init__(
        self,
        fetch: Callable[[Query[dict[int, RunState | None]]], Awaitable[dict[int, RunState | None]]],
        listener: Listener,
        services: Services,
        *,
        poll_interval: float,
    ) -> None:
        self._fetch = fetch
        self._listener = listener
        self._polling = every(timedelta(seconds=poll_interval), self._read_all)
        self._waiting: dict[int, set[EndingFuture]] = {}
        self._services = services
        self._quiet_polls = 0
        self._is_closed = False

    async def wait(self, run_ids: Collection[int]) -> dict[int, RunState | None]:
        """How these runs ended, once all of them have; None for one that does not exist. Waits for ever, through outages
        too: the caller brings the deadline. Raises DatabaseUnavailable where the App was closed meanwhile."""
        if self._is_closed:
            raise _closed()
        loop = asyncio.get_running_loop()
        answers: dict[int, EndingFuture] = {run_id: loop.create_future() for run_id in run_ids}
        for run_id, answer in answers.items():
            self._waiting.setdefault(run_id, set()).add(answer)
        self._quiet_polls = 0
        self._services.ensure(NOTICES_SERVICE, self._listen)
        self._services.ensure(POLLS_SERVICE, self._polling)
        try:
            # Somebody may be listening already, and then nobody reads for a newcomer but itself.
            try:
                await self._read(answers.keys())
            except NOT_EXECUTED as refused:
                if is_forbidden(refused):
                    raise
            return {run_id: await answer for run_id, answer in answers.items()}
        finally:
            for run_id, answer in answers.items():
                self._forget(run_id, answer)

    def _forget(self, run_id: int, answer: EndingFuture) -> None:
        # An error is raised for all who wait; a caller who waits for several runs gets the first one.
        if not answer.cancel() and not answer.cancelled():
            answer.exception()
        others = self._waiting.get(run_id, set())
        others.discard(answer)
        if not others:
            self._waiting.pop(run_id, None)

    def close(self) -> None:
        """Wake everyone who waits, to be told so."""
        self._is_closed = True
        for answers in self._waiting.values():
            for answer in answers:
                if not answer.done():
                    answer.set_exception(_closed())

    async def _listen(self, service: Service) -> None:
        with self._listener.subscribed(channels.FINISHED) as notices:
            async for heard in notices:
                ended = None if isinstance(heard, NoticesMissed) else channels.read_run_ids(heard.payload)
                try:
                    await self._read(self._waiting.keys() if ended is None else self._waiting.keys() & ended)
                except NOT_EXECUTED as lost:
                    # The poll finds what was not found now.
                    service.failed(lost)
                else:
                    service.well()

    async def _read_all(self) -> None:
        await self._read(self._waiting.keys())
        self._quiet_polls = 0 if self._waiting else self._quiet_polls + 1
        if self._quiet_polls > QUIET_POLLS:
            # Or each ending of the whole fleet would wake this process for nothing.
            for name in (NOTICES_SERVICE, POLLS_SERVICE):
                self._services.stop(name)

    async def _read(self, run_ids: Collection[int]) -> None:
        if not run_ids:
            return
        endings = await self._fetch(queries.endings(list(run_ids)))
        for run_id, state in endings.items():
            for answer in self._waiting.get(run_id, ()):
                if not answer.done():
                    answer.set_result(state)


def _closed() -> DatabaseUnavailable:
    """A new one for each who waits: a traceback that they shared would grow with every one of them."""
    return DatabaseUnavailable("This App was closed while a run was waited for.")
