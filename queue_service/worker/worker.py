"""A worker: what it is told, its life, and how that ends.

One that is cancelled, as by a task group whose other task has failed, stops as it would otherwise, only at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import msgspec

from queue_service.app import App
from queue_service.app.hooks import Hook
from queue_service.backoff import Pauses
from queue_service.db.execute import NOT_EXECUTED
from queue_service.db.meaning import is_full
from queue_service.errors import ConfigError, DatabaseUnavailable
from queue_service.exceptions import message, rendered
from queue_service.logs import get_logger
from queue_service.roster import queries as roster
from queue_service.runs import context
from queue_service.services.sight import require_sight
from queue_service.settings import Settings
from queue_service.version import VERSION
from queue_service.waiting import to_its_end
from queue_service.worker.endpoint import Endpoint
from queue_service.worker.hooks import started
from queue_service.worker.parts import Parts
from queue_service.worker.tally import Tally

log = get_logger(__name__)

MAX_CONCURRENCY = 100_000
MAX_PORT = 65_535
# For so many seconds a worker that is cancelled stops by itself.
CANCELLED_SECONDS = 5.0
# How long it waits between two looks whether the server has a connection for it.
FIRST_PAUSE, MAX_PAUSE = 0.1, 1.0
# A worker that ends does not wait for a server that is gone only to strike its own name out.
LEAVE_DEADLINE = 2.0


class Worker:
    """Works on queues: `{"name": concurrency}`. `settings` overrides those of the App. Runs of tasks with `process=True`
    have at most so many `processes` at once; without a number, as many as there are processors. With a `health_port`
    (0: a free one) it answers probes at `/livez` and `/readyz`; `health_url` says where.

    Runs that lost their worker run in a process of their own, which `suspect_command` starts while there are any: a worker
    like this one, with `only_suspects`, that runs once. Without such a command they get a tenth of this worker's time, in
    which it begins nothing else. `on_start` and `on_stop` are called besides those of the App, for this worker alone."""

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
        suspect_command: Sequence[str] | None = None,
        only_suspects: bool = False,
        on_start: Hook | None = None,
        on_stop: Hook | None = None,
    ) -> None:
        self.app = app
        self.queues = _checked(queues or {"default": 10})
        self.processes = _processes(processes)
        self.settings = settings or app.settings
        self.name = name or f"{socket.gethostname()}:{os.getpid()}"
        self._suspect_command = suspect_command
        self._only_suspects = only_suspects
        self._on_start = [hook for hook in (on_start,) if hook is not None]
        self._on_stop = [hook for hook in (on_stop,) if hook is not None]
        self._health = None if health_port is None else (health_host, _port(health_port))
        self.health_url: str | None = None
        self.id: int | None = None
        self._parts: Parts | None = None
        self._stop, self._stop_now = asyncio.Event(), asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, *, once: bool = False) -> Tally:
        """Work until `stop`; with `once`, until nothing is due and all that was begun has ended. Returns what was done.

        Where this is cancelled, the worker stops as by `stop(now=True)`, within 5 s, and then the cancellation goes on.
        Raises SchemaMismatch, DatabaseUnavailable, or ConfigError (its health port is taken, its role does not see every
        run) if it cannot start; where the server has no connection left, it waits for one. Once started it survives every
        outage.
        """
        if self._loop is not None:
            raise ConfigError("This Worker is running already. Make another one for a second run at the same time.")
        self._loop = asyncio.get_running_loop()
        life = asyncio.create_task(self._live(once=once), name="worker")
        try:
            with self._stopped_by_ctrl_c():
                return await asyncio.shield(life)
        except asyncio.CancelledError:
            self.stop(now=True)
            await _ended_in_time(life)
            raise
        finally:
            self._loop = None
            self._stop, self._stop_now = asyncio.Event(), asyncio.Event()

    @contextlib.contextmanager
    def _stopped_by_ctrl_c(self) -> Iterator[None]:
        """Where the whole program is this worker, as in `asyncio.run(worker.run())`, Ctrl-C lets handlers end, and the
        second one cancels them. A program that does more has Ctrl-C for itself."""
        before = signal.getsignal(signal.SIGINT)
        # How asyncio's runner has its main task cancelled.
        main_task = before.keywords.get("main_task") if isinstance(before, functools.partial) else None
        if main_task is None or main_task is not asyncio.current_task():
            yield
            return
        signals = 0

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal signals
            signals += 1
            self.stop(now=signals > 1)
            if signals > 2 and callable(before):
                before(number, frame)

        signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    async def _live(self, *, once: bool) -> Tally:
        endpoint = None
        try:
            if self._health is not None:
                endpoint = Endpoint(*self._health)
                self.health_url = endpoint.url
            worker_id = self.id = await self._join(None if once or self._only_suspects else self._fleet())
            if worker_id is None:
                return Tally()
            try:
                log.info(
                    "worker started",
                    worker_id=worker_id, queues=self.queues, tasks=sorted(self.app.tasks), health=self.health_url,
                )  # fmt: skip
                parts = self._parts = Parts(
                    self.app, self.settings, worker_id, queues=self.queues, processes=self.processes, name=self.name,
                    endpoint=endpoint, suspect_command=None if once else self._suspect_command,
                    only_suspects=self._only_suspects,
                )  # fmt: skip
                hooks = self.app.hooks
                try:
                    async with started(hooks.on_start + self._on_start, hooks.on_stop + self._on_stop):
                        with context.registered(parts.contexts.find):
                            await parts.run(once=once, stop=self._stop, stop_now=self._stop_now)
                finally:
                    await self._leave(worker_id)
                log.info("worker stopped", worker_id=worker_id, **_counts(parts.finisher.tally))
                return parts.finisher.tally
            finally:
                await self.app.close()
        finally:
            if endpoint is not None:
                endpoint.close()

    async def _join(self, fleet: str | None) -> int | None:
        """Connect, and enter the roster; the id there. Where the server has no connection left, wait until others have
        ended theirs: whatever starts workers would only start this one again and again. None: it was stopped meanwhile."""
        pauses = Pauses(FIRST_PAUSE, MAX_PAUSE, jitter=random.random)
        while True:
            try:
                return await self._enter(fleet)
            except DatabaseUnavailable as full:
                if not is_full(full):
                    raise
                if not pauses.count:
                    log.warning("the server has no connection left for this worker; waiting for one", why=str(full))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pauses.next()):
                    await self._stop.wait()
            if self._stop.is_set():
                return None

    async def _enter(self, fleet: str | None) -> int:
        await self.app.open()
        try:
            await require_sight(self.app.fetch, "worker")
            queues = msgspec.json.encode(self.queues).decode()
            return await self.app.fetch(roster.join(self.name, VERSION, queues, fleet))
        except BaseException:
            await to_its_end(self.app.close())
            raise

    def _fleet(self) -> str:
        """With whom it takes turns in looking first."""
        return roster.fleet_name(self.queues, self.app.tasks)

    async def _leave(self, worker_id: int) -> None:
        """Nothing depends on the roster: what is said of the run must not be lost to it."""
        try:
            async with asyncio.timeout(LEAVE_DEADLINE):
                await self.app.fetch(roster.leave(worker_id))
        except (TimeoutError, *NOT_EXECUTED) as lost:
            log.info("this worker could not strike its name out; the roster forgets it in time", why=message(lost))

    @property
    def tally(self) -> Tally:
        """What was done so far in this run, or in the last one."""
        return self._parts.finisher.tally if self._parts is not None else Tally()

    def stop(self, *, now: bool = False) -> None:
        """Stop claiming, let handlers end within `drain_timeout`, hand the rest back. With `now`, cancel and hand back at
        once. May be called from any thread and from signal handlers, any number of times; before `run`, that stops at once.
        """
        for event in (self._stop, self._stop_now) if now else (self._stop,):
            if self._loop is None:
                event.set()
            else:
                # A closed loop: nobody is left to be stopped.
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(event.set)

    def abandon(self) -> None:
        """Hand back every run that is here, on a connection of its own, for a process that is about to end: may be called
        from any thread, also while the event loop is blocked. Raises DatabaseUnavailable."""
        if self._parts is not None:
            self._parts.abandon()

    def dump(self) -> None:
        """Log what runs here and where it is: each run with its stack, and the other threads and tasks. May be called from
        any thread, also while the event loop is blocked."""
        if self._loop is None or self._parts is None:
            log.warning("this worker does not run", starting=self._loop is not None)
        else:
            self._parts.dump.log()


async def _ended_in_time(life: asyncio.Task[Any]) -> None:
    """Wait for it for CANCELLED_SECONDS, however often we are cancelled meanwhile (anyio does so again and again), and
    cancel it then. What it raises is logged, since its caller gets a cancellation."""
    deadline = time.monotonic() + CANCELLED_SECONDS
    while not life.done() and (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([life], timeout=left)
    if not life.done():
        life.cancel()
    elif not life.cancelled() and (broken := life.exception()) is not None:
        log.error("the worker could not stop as it should", why=message(broken), exception=rendered(broken))


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
