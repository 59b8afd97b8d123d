"""Keeps the worker's leases, from an operating system thread with an event loop and a connection of its own.

A handler that blocks the worker's loop therefore loses nothing. Only the database's word ends a lease: while it cannot
be reached nobody can sweep either, and when it is back, whoever comes first decides. A lease is first extended a third
of its length after it was made, so that short runs cost nothing here. A request to cancel whose notice was lost, or came
before the answer to the claim, is found at the next poll.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import NamedTuple

from queue_service.db.own_connection import OwnConnection
from queue_service.db.session import Address
from queue_service.exceptions import message
from queue_service.logs import get_logger
from queue_service.roster import queries as roster
from queue_service.runs import queries
from queue_service.services.loop import Service
from queue_service.worker.leases import Leases

log = get_logger(__name__)


class Keeper:
    """Calls, on the worker's loop, `on_lost` with swept leases, `on_cancel` with runs that someone wants cancelled, and
    `on_fleet` with what a beat has found, and the moments (monotonic) between which it looked. `failing` is asked, from the
    keeper's thread, for the services that are."""

    def __init__(
        self,
        address: Address,
        leases: Leases,
        worker_id: int,
        *,
        lease: timedelta,
        poll_interval: timedelta,
        on_lost: Callable[[Collection[int]], None],
        on_cancel: Callable[[Collection[int]], None],
        on_fleet: Callable[[roster.Fleet, float, float], None],
        failing: Callable[[], list[str]],
    ) -> None:
        self._connection = OwnConnection(address, application="queue_service keeper")
        self._leases = leases
        self._worker_id = worker_id
        self._lease = lease
        self._poll = poll_interval.total_seconds()
        self._on_lost = on_lost
        self._on_cancel = on_cancel
        self._on_fleet = on_fleet
        self._failing = failing
        # Why the roster does not know that we live; None: it does.
        self._unsaid: str | None = None

    async def run(self, service: Service) -> None:
        """Keep leases until cancelled. An error of the thread is raised here."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        worker, stop = _Worker(loop, service), threading.Event()

        def keep() -> None:
            try:
                asyncio.run(self._keep(worker, stop))
            except BaseException as error:  # noqa: BLE001 - handed to the worker, which begins anew
                outcome: BaseException | None = error
            else:
                outcome = None
            worker.call(_settle, ended, outcome)

        thread = threading.Thread(target=keep, name="queue_service keeper", daemon=True)
        thread.start()
        try:
            await asyncio.shield(ended)
        finally:
            stop.set()
            await asyncio.wait([ended], timeout=1.0)

    async def extend(self) -> set[int]:
        """Extend what is due. Returns the leases that turned out to be lost."""
        due = self._leases.due(self._lease.total_seconds() / 3)
        if not due:
            return set()
        begun = time.monotonic()
        ids = {lease.id for lease in due}
        held = await self._connection.fetch(queries.extend(ids, self._lease))
        for lease in due:
            if lease.id in held:
                # From the beginning of the call: the row's deadline can only be later than what is counted here.
                lease.extended_at = begun
        # A lease that the finisher let go while we asked is no longer ours to lose.
        return ids - held

    async def _keep(self, worker: _Worker, stop: threading.Event) -> None:
        beat = self._lease.total_seconds() / 6
        pause, next_beat = min(beat, self._poll), 0.0
        try:
            while not stop.is_set():
                try:
                    if (now := time.monotonic()) >= next_beat:
                        # The leases first: nothing depends on the roster.
                        if lost := await self.extend():
                            worker.call(self._on_lost, lost)
                        next_beat = now + beat
                        await self._beat(worker)
                    if asked := await self._cancel_requests():
                        worker.call(self._on_cancel, asked)
                except Exception as why:  # noqa: BLE001 - the next one may go through
                    worker.call(worker.service.failed, why)
                    await asyncio.to_thread(stop.wait, min(pause, 1.0))
                else:
                    worker.call(worker.service.well)
                    await asyncio.to_thread(stop.wait, pause)
        finally:
            await self._connection.close()

    async def _beat(self, worker: _Worker) -> None:
        """Say in the roster that this worker lives, if that can be said at once."""
        try:
            asked_at = time.monotonic()
            beat = roster.beat(self._worker_id, self._failing(), silence=self._lease / 2)
            fleet = await self._connection.fetch(beat, deadline=self._lease.total_seconds() / 12)
        except Exception as refused:  # noqa: BLE001 - as above
            why = message(refused)
            if why != self._unsaid:
                log.warning("cannot write to the roster that this worker lives", why=why)
            self._unsaid = why
        else:
            self._unsaid = None
            worker.call(self._on_fleet, fleet, asked_at, time.monotonic())

    async def _cancel_requests(self) -> list[int]:
        ids = [lease.id for lease in self._leases.due(0)]
        return await self._connection.fetch(queries.cancel_requests(ids)) if ids else []


class _Worker(NamedTuple):
    """The worker, as it is seen from the keeper's thread."""

    loop: asyncio.AbstractEventLoop
    service: Service

    def call(self, what: Callable[..., object], *arguments: object) -> None:
        # A closed loop: the worker is gone, and nobody is left to be informed.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(what, *arguments)


def _settle(ended: asyncio.Future[None], error: BaseException | None) -> None:
    if not ended.done():
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)
