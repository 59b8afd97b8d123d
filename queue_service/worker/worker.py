"""The worker process: its parts put together, and the order in which they stop.

Claiming stops first, then the handlers, then the writing of endings, and last the keeping of leases: a lease is kept for
as long as anything under it may still be written. Each part runs in one task group, so that the death of any of them
ends the worker with its error instead of leaving it half alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping
from datetime import timedelta
from typing import Any

import msgspec

from queue_service.app import App
from queue_service.db import channels
from queue_service.db.listener import Listener, NoticesMissed
from queue_service.db.pool import OwnConnection
from queue_service.errors import ConfigError, DatabaseUnavailable
from queue_service.logs import get_logger
from queue_service.roster import queries as roster
from queue_service.runs import context
from queue_service.runs.model import Run
from queue_service.runs.queries import Claimant
from queue_service.settings import Settings
from queue_service.version import VERSION
from queue_service.worker.claimer import Claimer
from queue_service.worker.dump import Dump
from queue_service.worker.endpoint import Endpoint
from queue_service.worker.executor import Executor
from queue_service.worker.finisher import Finisher, Tally
from queue_service.worker.handlers.context import HandlerContexts
from queue_service.worker.handlers.processes import Processes
from queue_service.worker.handlers.threads import Threads
from queue_service.worker.health import Health
from queue_service.worker.keeper import Keeper
from queue_service.worker.lag import LagWatch
from queue_service.worker.leases import Leases
from queue_service.worker.maintenance import Maintenance

log = get_logger(__name__)

MAX_CONCURRENCY = 100_000
MAX_PORT = 65_535
# A worker that ends does not wait for a server that is gone only to strike its own name out.
LEAVE_DEADLINE = 2.0
# How long endings wait for what another session has locked, before those that need it are set aside.
MAX_LOCK_WAIT = timedelta(seconds=1)


class Worker:
    """Works on queues: `{"name": concurrency}`. `settings` overrides those of the App. Runs of tasks with `process=True`
    have at most so many `processes` at once; without a number, as many as there are processors. With a `health_port`
    (0: a free one) it answers probes at `/livez` and `/readyz`; `health_url` says where."""

    def __init__(
        self,
        app: App,
        queues: Mapping[str, int] | None = None,
        *,
        settings: Settings | None = None,
        name: str | None = None,
        processes: int | None = None,
        health_port: int | None = None,
        health_host: str = "127.0.0.1",
    ) -> None:
        self.app = app
        self.queues = _checked(queues or {"default": 10})
        self.processes = _processes(processes)
        self.settings = settings or app.settings
        self.name = name or f"{socket.gethostname()}:{os.getpid()}"
        self._health = None if health_port is None else (health_host, _port(health_port))
        self.health_url: str | None = None
        self.id: int | None = None
        self._parts: _Parts | None = None
        self._stop: asyncio.Event | None = None
        self._stop_now: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, *, once: bool = False) -> Tally:
        """Work until `stop`; with `once`, until nothing is due and all that was begun has ended. Returns what was done.

        Raises SchemaMismatch, DatabaseUnavailable, or ConfigError where its health port is taken, if it cannot start; once
        started it survives every outage.
        """
        if self._loop is not None:
            raise ConfigError("This Worker is running already. Make another one for a second run at the same time.")
        self._loop = asyncio.get_running_loop()
        self._stop, self._stop_now = asyncio.Event(), asyncio.Event()
        endpoint = None
        try:
            if self._health is not None:
                endpoint = Endpoint(*self._health)
                self.health_url = endpoint.url
            async with self.app:
                self.id = await self.app.fetch(
                    roster.join(self.name, VERSION, msgspec.json.encode(self.queues).decode())
                )
                log.info(
                    "worker started",
                    worker_id=self.id, queues=self.queues, tasks=sorted(self.app.tasks), health=self.health_url,
                )  # fmt: skip
                parts = self._parts = _Parts(self, self.id, endpoint)
                try:
                    with context.registered(parts.contexts.find):
                        await parts.run(once=once, stop=self._stop, stop_now=self._stop_now)
                finally:
                    with contextlib.suppress(DatabaseUnavailable, TimeoutError):
                        async with asyncio.timeout(LEAVE_DEADLINE):
                            await self.app.fetch(roster.leave(self.id))
                log.info("worker stopped", worker_id=self.id, **_counts(parts.finisher.tally))
                return parts.finisher.tally
        finally:
            self._loop = None
            if endpoint is not None:
                endpoint.close()

    @property
    def tally(self) -> Tally:
        """What was done so far in this run, or in the last one."""
        return self._parts.finisher.tally if self._parts is not None else Tally()

    def stop(self, *, now: bool = False) -> None:
        """Stop claiming, let handlers end within `drain_timeout`, hand the rest back. With `now`, cancel and hand back at
        once. May be called from any thread and from signal handlers, any number of times.
        """
        if self._loop is not None and self._stop is not None and self._stop_now is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            if now:
                self._loop.call_soon_threadsafe(self._stop_now.set)

    def dump(self) -> None:
        """Log what runs here and where it is: each run with its stack, and the other threads and tasks. May be called from
        any thread, also while the event loop is blocked."""
        if self._loop is None or self._parts is None:
            log.warning("this worker does not run", starting=self._loop is not None)
        else:
            self._parts.dump.log()


class _Parts:
    def __init__(self, worker: Worker, worker_id: int, endpoint: Endpoint | None) -> None:
        app, settings = worker.app, worker.settings
        self._settings = settings
        self._group = asyncio.TaskGroup()
        self._threads = Threads(on_change=self._threads_changed)
        self._processes = Processes(
            worker.processes, conninfo=app.conninfo, worker_id=worker_id, result_limit=settings.payload_limit
        )
        # The claimer reads it at each claim; tasks that cannot be begun now are not in it.
        self._claimable = sorted(app.tasks)
        self._claiming = OwnConnection(app.conninfo, application="queue_service claimer")
        # The keeper waits for it, and must come in time.
        lock_wait = min(MAX_LOCK_WAIT, settings.lease / 6)
        self._finishing = OwnConnection(app.conninfo, application="queue_service finisher", lock_timeout=lock_wait)
        leases = Leases()
        self.finisher = Finisher(self._finishing, leases, worker_id, announce=self._announce, free=self._free)
        self._app = app
        self._leases = leases
        self.executors = {queue: self._executor(queue, concurrency) for queue, concurrency in worker.queues.items()}
        final = sorted(name for name, task in app.tasks.items() if task.on_lost == "fail")
        self.claimer = Claimer(
            self._claiming,
            self.executors,
            leases,
            self.finisher,
            Claimant(self._claimable, worker_id, settings.lease, app.identity, final),
            poll_interval=settings.poll_interval,
        )
        self._keeper = Keeper(
            app.conninfo, leases, worker_id, lease=settings.lease, poll_interval=settings.poll_interval,
            on_lost=self._lose, on_cancel=self._cancel,
        )  # fmt: skip
        self.contexts = HandlerContexts(app, self.executors, worker_id=worker_id, settings=settings)
        self._lag = LagWatch(self._run_of)
        self._maintenance = Maintenance(app, settings)
        self._slots: set[asyncio.Task[None]] = set()
        self._listener = Listener(app.conninfo, [channels.RUNS, channels.CANCEL])
        self._endpoint = endpoint
        poll = settings.poll_interval.total_seconds()
        self._health = Health(self.claimer, self._listener, app.pool, poll_interval=poll, worker=worker.name)
        self.dump = Dump(app.tasks, self.executors.values(), self._slots, self._threads, self._processes)

    async def run(self, *, once: bool, stop: asyncio.Event, stop_now: asyncio.Event) -> None:
        """Work until `stop`, or with `once` until nothing is due, and then drain; `stop_now` ends the draining. Raises what
        ended a part that must not end."""
        await self._maintenance.begin(once=once)
        try:
            async with self._group, self._closing_slots():
                background = [
                    self._start(self._keeper.run()),
                    self._start(self._lag.run()),
                    self._start(self.contexts.reports.run()),
                    self._start(self._listen()),
                    *map(self._start, self._maintenance.loops()),
                ]
                if self._endpoint is not None:
                    background.append(self._start(self._health.run(self._endpoint)))
                finishing = self._start(self.finisher.run())
                claiming = self._start(self.claimer.run(once=once))
                await _first(claiming, stop.wait())
                await self._drain(stop_now)
                await claiming
                self.finisher.close()
                await finishing
                self._close_slots()
                for task in (*self._slots, *background):
                    task.cancel()
        except* Exception as group_error:  # noqa: BLE001 - raised again, out of its group
            # One part failed and the others were cancelled for it: its error is the one to raise.
            raise group_error.exceptions[0] from None
        finally:
            self._threads.close()
            await self._processes.close()
            await self.contexts.lender.close()
            await self._claiming.close()
            await self._finishing.close()

    def _executor(self, queue: str, concurrency: int) -> Executor:
        return Executor(
            queue,
            concurrency,
            tasks=self._app.tasks,
            finisher=self.finisher,
            threads=self._threads,
            processes=self._processes,
            reported=self._reported,
            result_limit=self._settings.payload_limit,
            spawn=self._spawn,
            room=self._wake_claimer,
        )

    def _start(self, part: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        async def watched() -> None:
            async with self._closing_slots(only_on_error=True):
                await part

        return self._group.create_task(watched())

    @contextlib.asynccontextmanager
    async def _closing_slots(self, *, only_on_error: bool = False) -> AsyncIterator[None]:
        """Let the slots know that a cancellation is now meant for themselves, before anyone cancels them."""
        try:
            yield
        except asyncio.CancelledError:
            if not only_on_error:
                self._close_slots()
            raise
        except BaseException:
            self._close_slots()
            raise

    def _close_slots(self) -> None:
        for executor in self.executors.values():
            executor.closing = True

    async def _drain(self, stop_now: asyncio.Event) -> None:
        """Stop claiming, hand back what was not begun, wait for the handlers, then cancel those that are left."""
        self.claimer.stop()
        for executor in self.executors.values():
            self.finisher.hand_back(executor.take_back())
        grace = self._settings.drain_timeout.total_seconds()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await _first(self._until_idle(), stop_now.wait())
        interrupted = sum(executor.interrupt_all() for executor in self.executors.values())
        if interrupted:
            log.warning("handlers cancelled, since their time to end is over", runs=interrupted)
            await self._until_idle()

    async def _until_idle(self) -> None:
        while not all(executor.is_idle for executor in self.executors.values()):  # noqa: ASYNC110 - an event would cost each run
            await asyncio.sleep(0.005)

    async def _listen(self) -> None:
        async for heard in self._listener.notices():
            if isinstance(heard, NoticesMissed):
                self.claimer.rescan()
            elif heard.channel == channels.CANCEL:
                self._cancel(channels.read_run_ids(heard.payload) or ())
            elif (where := channels.read_enqueued(heard.payload)) is not None:
                self.claimer.enqueued(*where)

    def _wake_claimer(self) -> None:
        self.claimer.wake()

    def _threads_changed(self) -> None:
        """At once, or when a thread that was given up has ended."""
        usable = [name for name, task in self._app.tasks.items() if task.is_async or task.process]
        self._claimable[:] = sorted(usable if self._threads.is_exhausted else self._app.tasks)
        self.claimer.rescan()

    def _run_of(self, task: asyncio.Task[Any]) -> Run | None:
        return next((run for each in self.executors.values() if (run := each.run_of(task)) is not None), None)

    def _reported(self, run: Run, progress: str) -> None:
        self.contexts.reports.put(run, progress)

    def _free(self, laned: set[str], limited: set[str]) -> None:
        self.claimer.ended(laned, limited)

    def _announce(self, ended: list[int]) -> None:
        self._app.notify([channels.about_runs(channels.FINISHED, ended)])

    def _cancel(self, run_ids: Collection[int]) -> None:
        for executor in self.executors.values():
            for run_id in run_ids:
                executor.cancel(run_id)

    def _lose(self, lease_ids: Collection[int]) -> None:
        for lease in self._leases.lose(lease_ids):
            for executor in self.executors.values():
                executor.lose(lease)

    def _spawn(self, slot: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._start(slot)
        self._slots.add(task)
        return task


async def _first(*awaitables: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> None:
    """Return when one of them is done; those that were given as coroutines are then cancelled."""
    tasks = [each if isinstance(each, asyncio.Task) else asyncio.ensure_future(each) for each in awaitables]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task, given in zip(tasks, awaitables, strict=True):
            if task is not given:
                task.cancel()


def _checked(queues: Mapping[str, int]) -> dict[str, int]:
    for name, concurrency in queues.items():
        if not isinstance(name, str) or not name:
            raise ConfigError(f"A queue is named by a text that is not empty, not {name!r}.")
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or not 1 <= concurrency <= MAX_CONCURRENCY:
            raise ConfigError(f"Queue {name!r} needs a concurrency from 1 to {MAX_CONCURRENCY:,}, not {concurrency!r}.")
    return dict(queues)


def _processes(number: int | None) -> int:
    if number is None:
        return os.cpu_count() or 1
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ConfigError(f"processes must be a whole number from 1, not {number!r}.")
    return number


def _port(number: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= MAX_PORT:
        raise ConfigError(f"health_port must be a port from 0 (a free one) to {MAX_PORT:,}, not {number!r}.")
    return number


def _counts(tally: Tally) -> dict[str, int]:
    return {name: getattr(tally, name) for name in Tally.__slots__}
