"""Logs what a worker does at this moment: each run and where its handler is, and what else goes on.

It is read from outside, by a thread that needs the event loop for nothing: the loop may be the very thing that is stuck.
Stacks are lines of source, without values, so that no payload is logged.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

from queue_service.logs import get_logger
from queue_service.runs.model import Run
from queue_service.tasks import Tasks
from queue_service.worker.executor import Executor
from queue_service.worker.handlers.coroutines import watched
from queue_service.worker.handlers.processes import Processes
from queue_service.worker.handlers.threads import NAME as HANDLER_THREAD
from queue_service.worker.handlers.threads import Threads
from queue_service.worker.leases import Held

log = get_logger(__name__)

# How many handlers, threads and tasks are logged, of each; those that run longest come first.
MAX_LOGGED = 100
DEPTH = 30

Frames = Iterator[tuple[FrameType, int]]


class _Handler(NamedTuple):
    """One that goes on: its run, or the first of its batch, and how many there are."""

    slot: asyncio.Task[Any]
    run: Run
    together: int
    since: float


class Dump:
    """Made on the event loop that it describes. `slots` are the tasks of that loop which are logged as runs."""

    def __init__(
        self,
        tasks: Tasks,
        executors: Collection[Executor],
        slots: Collection[asyncio.Task[Any]],
        threads: Threads,
        processes: Processes,
    ) -> None:
        self._tasks = tasks
        self._executors = executors
        self._slots = slots
        self._threads = threads
        self._processes = processes
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.current_thread()

    def log(self) -> None:
        """May be called from any thread."""
        handlers = sorted(self._handlers(), key=lambda each: each.since)
        runs, shown = sum(each.together for each in handlers), min(len(handlers), MAX_LOGGED)
        log.warning("what this worker does", runs=runs, handlers=len(handlers), shown=shown)
        seen = {threading.current_thread()}
        for each in handlers[:MAX_LOGGED]:
            self._log_handler(each, seen)
        self._log_threads([thread for thread in threading.enumerate() if thread not in seen])
        others = [task for task in asyncio.all_tasks(self._loop) if task not in self._slots]
        for task in others[:MAX_LOGGED]:
            stack = _text(_awaited(task.get_coro()))
            log.warning("a task of the event loop", asyncio_task=task.get_name(), stack=stack)

    def _handlers(self) -> list[_Handler]:
        slots: dict[asyncio.Task[Any], list[Held]] = {}
        for executor in self._executors:
            for held, slot in executor.executing():
                slots.setdefault(slot, []).append(held)
        return [_Handler(slot, held[0].run, len(held), held[0].lease.taken_at) for slot, held in slots.items()]

    def _log_handler(self, each: _Handler, seen: set[threading.Thread]) -> None:
        run, task = each.run, self._tasks[each.run.task]
        more: dict[str, object] = {"together": each.together} if each.together > 1 else {}
        if task.process:
            where, more["pid"] = "process", self._processes.pid_of(run)
        elif not task.is_async:
            where = "thread"
            for thread, its in list(self._threads.at_work.items()):
                if its is run:
                    seen.add(thread)
                    more["stack"] = _text(_frames_of(thread))
        elif asyncio.current_task(self._loop) is each.slot:
            where = "event loop, at work"
            seen.add(self._loop_thread)
            more["stack"] = _text(_frames_of(self._loop_thread))
        else:
            where, more["stack"] = "event loop, waiting", _text(_awaited(each.slot.get_coro()))
        executions = [found for each in self._executors if (found := each.execution_of(run)) is not None]
        if executions and (since := executions[0].waiting_since) is not None:
            more["waits_for_connection"] = round(time.monotonic() - since, 1)
        log.warning(
            "a run", run_id=run.id, task=run.task, queue=run.queue, attempt=run.attempt,
            seconds=round(time.monotonic() - each.since, 1), where=where, **more,
        )  # fmt: skip

    def _log_threads(self, threads: Sequence[threading.Thread]) -> None:
        for thread in threads[:MAX_LOGGED]:
            run = self._threads.at_work.get(thread)
            stack = _text(_frames_of(thread))
            if run is not None:
                log.warning("a thread whose handler was given up", run_id=run.id, task=run.task, stack=stack)
            elif thread.name != HANDLER_THREAD:
                log.warning("a thread", thread_name=thread.name, stack=stack)


@contextmanager
def on_signal(number: int, call: Callable[[], object]) -> Iterator[None]:
    """In the block, `call` is called whenever this process gets the signal, in a thread of its own.

    A handler by the `signal` module would run in the main thread, between two steps of Python: not while that is in a
    call which does not return. What `faulthandler` writes comes at once, whatever the main thread is at; it is only
    taken as the news that the signal came.
    """
    reading, writing = os.pipe()
    # Full, when nobody could read for long: then the news is on its way already.
    os.set_blocking(writing, False)

    def watch() -> None:
        while said := os.read(reading, 65_536):
            if b"most recent call first" in said:
                try:
                    call()
                except Exception:
                    log.exception("what this worker does cannot be logged")
        os.close(reading)

    threading.Thread(target=watch, name="queue_service dump", daemon=True).start()
    faulthandler.register(number, file=writing, all_threads=False)
    try:
        yield
    finally:
        faulthandler.unregister(number)
        os.close(writing)


def _frames_of(thread: threading.Thread) -> Frames:
    """Where a thread is. Of a handler's on the event loop, without the slot's."""
    frames = []
    frame = sys._current_frames().get(thread.ident or 0)  # noqa: SLF001 - the one way to see where another thread is
    while frame is not None and frame.f_code is not watched.__code__:
        frames.append((frame, frame.f_lineno))
        frame = frame.f_back
    return reversed(frames)


def _awaited(coroutine: Any) -> Frames:
    """Where a coroutine waits: its own frame, and those of what it awaits. Of a handler's, without the slot's."""
    frames: list[tuple[FrameType, int]] = []
    while coroutine is not None:
        frame = next((f for f in (getattr(coroutine, f"{kind}_frame", None) for kind in ("cr", "gi", "ag")) if f), None)
        if frame is None:
            break
        frames.append((frame, frame.f_lineno))
        if frame.f_code is watched.__code__:
            frames.clear()
            coroutine = frame.f_locals["call"]
        else:
            awaits = (getattr(coroutine, name, None) for name in ("cr_await", "gi_yieldfrom", "ag_await"))
            coroutine = next((each for each in awaits if each is not None), None)
    return iter(frames)


def _text(frames: Frames) -> str:
    return "".join(traceback.StackSummary.extract(frames, limit=-DEPTH).format())
