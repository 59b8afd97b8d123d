"""Long-lived tasks. What goes wrong in one is logged and does not end it: it is tried again, or started anew after a pause
that grows. How each does is seen by whoever asks.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta

import msgspec

from queue_service.backoff import Pauses
from queue_service.db.execute import cancellable
from queue_service.errors import DatabaseUnavailable
from queue_service.exceptions import is_a, message, rendered, type_name
from queue_service.logs import get_logger

log = get_logger(__name__)

FIRST_PAUSE, MAX_PAUSE = 0.1, 30.0
# So long at most while there is no database: with full jitter, and no longer, since all is to work soon after it is back.
OUTAGE_PAUSE = 1.0
# One that has worked for so many seconds begins again with the first pause.
STEADY = 60.0

Work = Callable[["Service"], Awaitable[object]]


class Service:
    """One long-lived task. `work` is called with this, and called again when it raises; when it returns, so does `run`.

    It is failing from the first error on until `work` says `well`, or until it has gone on for STEADY seconds.
    """

    def __init__(self, name: str, work: Work) -> None:
        self.name = name
        self.task: asyncio.Task[None] | None = None
        self._work = work
        self._is_stopped = False
        #: Set once the work has returned.
        self.has_returned = asyncio.Event()
        #: (monotonic) When it said last that all is well, or began.
        self.well_at = time.monotonic()
        #: (monotonic) Since when it has been failing; None is as it should be.
        self.failing_since: float | None = None
        #: What was raised last, for as long as it is failing.
        self.why: str | None = None

    async def run(self) -> None:
        """Until the work returns, or this is cancelled."""
        pauses = Pauses(FIRST_PAUSE, MAX_PAUSE)
        while True:
            began = time.monotonic()
            try:
                with cancellable():
                    await self._work(self)
            except Exception as broken:  # noqa: BLE001 - whatever it is, the work goes on
                self.failed(broken)
                is_outage = is_a(broken, DatabaseUnavailable)
            else:
                self.has_returned.set()
                return
            if time.monotonic() - began > STEADY:
                pauses.reset()
            await asyncio.sleep(_outage_pause() if is_outage else pauses.next())

    def stop(self) -> None:
        """Cancel its task, once: psycopg has a statement cancelled on the server, and a second time leaves that undone."""
        # `task.cancelling()` does not tell: it also counts an `asyncio.timeout` of the work's own that has just passed, and
        # that one takes its cancellation back.
        if self.task is not None and not self._is_stopped:
            self._is_stopped = True
            self.task.cancel()

    @property
    def condition(self) -> Condition:
        now = time.monotonic()
        failing = None if self.failing_since is None else round(now - self.failing_since, 1)
        return Condition(failing is None, round(now - self.well_at, 1), failing)

    def well(self) -> None:
        """What the work does goes through."""
        self.well_at = time.monotonic()
        if self.failing_since is not None:
            log.info("it works again", service=self.name, seconds=round(self.well_at - self.failing_since, 1))
            self.failing_since = self.why = None

    def failed(self, error: Exception) -> None:
        """Something went wrong, and the work goes on or is begun anew. Each new reason is logged, with its traceback unless
        it is an outage."""
        why = f"{type_name(error)}: {message(error)}"
        if self.failing_since is None:
            self.failing_since = time.monotonic()
        if why != self.why:
            if is_a(error, DatabaseUnavailable):
                log.warning("the database is lost; trying again", service=self.name, why=message(error))
            else:
                log.error("this has failed, and is tried again", service=self.name, why=why, exception=rendered(error))
        self.why = why


class Condition(msgspec.Struct, frozen=True):
    """How a service does, for whoever may ask: not why it fails, which may name hosts and users. Seconds since all was
    well, and for how long it has been failing."""

    is_well: bool = msgspec.field(name="ok")
    age: float
    failing: float | None = None


class Services:
    """The long-lived tasks of one owner, by name, on one event loop. Iterating gives those that run."""

    def __init__(self) -> None:
        self._running: dict[str, Service] = {}
        # Those of which a task runs, also where it was told to stop and has not ended yet.
        self._alive: set[Service] = set()

    def __iter__(self) -> Iterator[Service]:
        return iter(list(self._running.values()))

    def ensure(self, name: str, work: Work) -> Service:
        """Let it run from now on, if it does not: until the work returns, or `stop`."""
        if name not in self._running:
            service = self._running[name] = Service(name, work)
            self._begin(service)
        return self._running[name]

    def stop(self, name: str) -> None:
        """Cancel it, if it runs. Returns before it has ended."""
        service = self._running.pop(name, None)
        if service is not None:
            service.stop()

    async def close(self) -> None:
        """Cancel them all, and wait for their end."""
        self._running.clear()
        for service in self._alive:
            service.stop()
        if self._alive:
            await asyncio.wait([service.task for service in self._alive if service.task is not None])

    def _begin(self, service: Service) -> None:
        if self._running.get(service.name) is not service:
            return
        service.task = asyncio.create_task(service.run(), name=service.name)
        self._alive.add(service)
        service.task.add_done_callback(lambda task: self._ended(service, task))

    def _ended(self, service: Service, task: asyncio.Task[None]) -> None:
        self._alive.discard(service)
        if self._running.get(service.name) is not service:
            return
        if task.cancelled():
            # By somebody else, as one who cancels whatever there is. Not at once: then the loop may be about to close.
            asyncio.get_running_loop().call_later(FIRST_PAUSE, self._begin, service)
        else:
            del self._running[service.name]


def every(interval: timedelta, once: Callable[[], Awaitable[object]], *, after: float = 0.0) -> Work:
    """Work that calls `once` for ever, first `after` so many seconds, and with up to a tenth of the interval as jitter, so
    that replicas drift apart."""

    async def work(service: Service) -> None:
        await asyncio.sleep(after)
        while True:
            try:
                with cancellable():
                    await once()
            except Exception as broken:  # noqa: BLE001 - the next one may go through
                service.failed(broken)
                if is_a(broken, DatabaseUnavailable):
                    await asyncio.sleep(min(_outage_pause(), interval.total_seconds()))
                    continue
            else:
                service.well()
            await asyncio.sleep(interval.total_seconds() * (0.95 + 0.1 * random.random()))  # noqa: S311

    return work


def _outage_pause() -> float:
    return OUTAGE_PAUSE * random.random()  # noqa: S311
