"""Waiting for runs to end: subscribe, then read, then wait for notices, with the poll as the floor.

One listener and one poll serve every waiter of the process.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection

from queue_service.db import channels
from queue_service.db.listener import Listener, NoticesMissed
from queue_service.db.query import Query
from queue_service.errors import DatabaseUnavailable
from queue_service.logs import get_logger
from queue_service.runs import queries
from queue_service.runs.model import RunState

log = get_logger(__name__)

EndingFuture = asyncio.Future[RunState | None]


class Endings:
    def __init__(
        self,
        fetch: Callable[[Query[dict[int, RunState | None]]], Awaitable[dict[int, RunState | None]]],
        listener: Listener,
        *,
        poll_interval: float,
    ) -> None:
        self._fetch = fetch
        self._listener = listener
        self._poll_interval = poll_interval
        self._waiting: dict[int, set[EndingFuture]] = {}
        self._watch: asyncio.Task[None] | None = None

    async def wait(self, run_ids: Collection[int]) -> dict[int, RunState | None]:
        """How these runs ended, once all of them have; None for one that does not exist. Waits for ever: the caller brings
        the deadline."""
        loop = asyncio.get_running_loop()
        answers: dict[int, EndingFuture] = {run_id: loop.create_future() for run_id in run_ids}
        for run_id, answer in answers.items():
            self._waiting.setdefault(run_id, set()).add(answer)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._run(), name="endings")
        try:
            # The watch may be listening already, and then nobody reads for a newcomer but itself.
            await self._read(answers.keys())
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

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._listen())
                group.create_task(self._poll())
        except* Exception as broken:  # noqa: BLE001 - raised for those who wait
            # Whoever waits must hear of it: without the watch they would wait for ever.
            for answers in self._waiting.values():
                for answer in answers:
                    if not answer.done():
                        answer.set_exception(broken.exceptions[0])

    async def _listen(self) -> None:
        async for heard in self._listener.notices():
            ended = None if isinstance(heard, NoticesMissed) else channels.read_run_ids(heard.payload)
            await self._read(self._waiting.keys() if ended is None else self._waiting.keys() & ended)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._poll_interval)
            await self._read(self._waiting.keys())

    async def _read(self, run_ids: Collection[int]) -> None:
        if not run_ids:
            return
        try:
            endings = await self._fetch(queries.endings(list(run_ids)))
        except DatabaseUnavailable as lost:
            log.debug("cannot look for endings; the poll tries again", why=str(lost))
            return
        for run_id, state in endings.items():
            for answer in self._waiting.get(run_id, ()):
                if not answer.done():
                    answer.set_result(state)
