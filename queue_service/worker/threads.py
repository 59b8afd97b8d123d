"""Threads for handlers that are not coroutines: one for each that runs, kept for the next, never waited for.

Unlike a pool of fixed size, a thread whose handler was given up (cancelled, or over its time) takes nobody's place, and
being a daemon it does not keep the process from ending. What a handler raises comes back as a value first: a future
refuses some exceptions, StopIteration among them, and its waiter would wait for ever.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple


class _Job(NamedTuple):
    call: Callable[[], Any]
    answer: asyncio.Future[tuple[Any, BaseException | None]]


class Threads:
    """Belongs to the event loop it is used on."""

    def __init__(self) -> None:
        self._idle: list[SimpleQueue[_Job | None]] = []
        self._closed = False

    async def run(self, call: Callable[[], Any]) -> Any:
        """The result of `call`, made in a thread with a copy of this context. When cancelled, the thread runs on alone."""
        loop = asyncio.get_running_loop()
        context = contextvars.copy_context()
        job = _Job(lambda: context.run(call), loop.create_future())
        if self._idle:
            jobs = self._idle.pop()
        else:
            jobs = SimpleQueue()
            thread = threading.Thread(target=self._work, args=(jobs, loop), name="queue_service handler", daemon=True)
            thread.start()
        jobs.put(job)
        value, error = await job.answer
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """Let the idle threads end, and the others once they are done."""
        self._closed = True
        while self._idle:
            self._idle.pop().put(None)

    def _work(self, jobs: SimpleQueue[_Job | None], loop: asyncio.AbstractEventLoop) -> None:
        while (job := jobs.get()) is not None:
            try:
                outcome: tuple[Any, BaseException | None] = (job.call(), None)
            except BaseException as error:  # noqa: BLE001 - it is the handler's, and told to the run
                outcome = (None, error)
            try:
                loop.call_soon_threadsafe(self._done, jobs, job, outcome)
            except RuntimeError:
                # The loop is closed: this thread was given up long ago.
                return

    def _done(self, jobs: SimpleQueue[_Job | None], job: _Job, outcome: tuple[Any, BaseException | None]) -> None:
        if not job.answer.done():
            job.answer.set_result(outcome)
        if self._closed:
            jobs.put(None)
        else:
            self._idle.append(jobs)
