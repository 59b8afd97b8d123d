"""Threads for handlers that are not coroutines: one for each that runs, kept for the next, never waited for.

Unlike a pool of fixed size, a thread whose handler was given up (cancelled, or over its time) takes nobody's place, and
being a daemon it does not keep the process from ending. But each runs on for as long as it likes, so only so many are
put up with: beyond them no handler is begun here until one has ended. What a handler raises comes back as a value first:
a future refuses some exceptions, StopIteration among them, and its waiter would wait for ever.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
import traceback
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple

from queue_service.logs import get_logger
from queue_service.runs.model import Run

log = get_logger(__name__)

MAX_ABANDONED = 100
NAME = "queue_service handler"


class Exhausted(Exception):
    """Too many threads run on whose handlers were given up; this handler was not begun."""


class _Job(NamedTuple):
    call: Callable[[], Any]
    answer: asyncio.Future[tuple[Any, BaseException | None]]


class _PooledThread(NamedTuple):
    """A thread, and what it is given to do."""

    jobs: SimpleQueue[_Job | None]
    thread: threading.Thread


class Threads:
    """Belongs to the event loop it is used on. `on_change` is called when it became exhausted, and when it no longer is."""

    def __init__(self, *, on_change: Callable[[], None] = lambda: None) -> None:
        self._idle: list[_PooledThread] = []
        self._abandoned: set[asyncio.Future[Any]] = set()
        # Whose handler each thread executes, also one that was given up.
        self.at_work: dict[threading.Thread, Run] = {}
        self._on_change = on_change
        self._closed = False
        self.is_exhausted = False

    async def run(self, run: Run, call: Callable[[], Any]) -> Any:
        """The result of `call`, made in a thread with a copy of this context. When cancelled, the thread runs on alone.
        Raises Exhausted."""
        if self.is_exhausted:
            raise Exhausted
        loop = asyncio.get_running_loop()
        context = contextvars.copy_context()
        job = _Job(lambda: context.run(call), loop.create_future())
        pooled = self._idle.pop() if self._idle else self._started(loop)
        self.at_work[pooled.thread] = run
        pooled.jobs.put(job)
        try:
            value, error = await job.answer
        except BaseException:
            self._abandon(run, job, pooled)
            raise
        if error is None:
            return value
        try:
            raise error
        finally:
            # Or it would hold this frame, and this frame it.
            del error

    def close(self) -> None:
        """Let the idle threads end, and the others once they are done."""
        self._closed = True
        while self._idle:
            self._idle.pop().jobs.put(None)

    def _started(self, loop: asyncio.AbstractEventLoop) -> _PooledThread:
        jobs: SimpleQueue[_Job | None] = SimpleQueue()
        thread = threading.Thread(target=self._work, args=(jobs, loop), name=NAME, daemon=True)
        thread.start()
        return _PooledThread(jobs, thread)

    def _abandon(self, run: Run, job: _Job, pooled: _PooledThread) -> None:
        if not job.answer.cancelled() and not job.answer.cancel():
            # It had just ended.
            return
        self._abandoned.add(job.answer)
        frame = sys._current_frames().get(pooled.thread.ident or 0)  # noqa: SLF001 - the one way to see what it is doing
        log.warning(
            "a handler in a thread was given up; it runs on without its run",
            run_id=run.id, task=run.task, abandoned=len(self._abandoned),
            stack="".join(traceback.format_stack(frame, limit=20)) if frame is not None else "",
        )  # fmt: skip
        if len(self._abandoned) >= MAX_ABANDONED and not self.is_exhausted:
            self.is_exhausted = True
            log.error(
                "too many threads run on whose handlers were given up: no run of a sync task is begun until some end. "
                "Let handlers look at `run.cancelled`, or give their tasks process=True",
                abandoned=len(self._abandoned),
            )
            self._on_change()

    def _work(self, jobs: SimpleQueue[_Job | None], loop: asyncio.AbstractEventLoop) -> None:
        pooled = _PooledThread(jobs, threading.current_thread())
        while (job := jobs.get()) is not None:
            try:
                outcome: tuple[Any, BaseException | None] = (job.call(), None)
            except BaseException as error:  # noqa: BLE001 - it is the handler's, and becomes its run's outcome
                outcome = (None, error)
            try:
                loop.call_soon_threadsafe(self._done, pooled, job, outcome)
            except RuntimeError:
                # The loop is closed: this thread was given up long ago.
                return
            # An idle thread keeps nothing of its last run.
            del job, outcome

    def _done(self, pooled: _PooledThread, job: _Job, outcome: tuple[Any, BaseException | None]) -> None:
        if not job.answer.done():
            job.answer.set_result(outcome)
        else:
            self._returned(job)
        del self.at_work[pooled.thread]
        if self._closed:
            pooled.jobs.put(None)
        else:
            self._idle.append(pooled)

    def _returned(self, job: _Job) -> None:
        """A handler that was given up has ended after all."""
        self._abandoned.discard(job.answer)
        if self.is_exhausted and len(self._abandoned) < MAX_ABANDONED:
            self.is_exhausted = False
            log.info("runs of sync tasks are begun again", abandoned=len(self._abandoned))
            self._on_change()
