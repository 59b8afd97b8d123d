"""What a worker is made of, and the order in which its parts stop.

Claiming stops first, then the handlers, then the writing of endings, and last the keeping of leases: a lease is kept for
as long as anything under it may still be written. Each part is a service of its own, which goes on whatever happens in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Collection, Coroutine, Mapping, Sequence
from datetime import timedelta
from typing import Any

from queue_service.app import App
from queue_service.db import channels
from queue_service.db.channels import Notice
from queue_service.db.execute import fetch_sync, translated
from queue_service.db.listener import NoticesMissed
from queue_service.db.session import Limits, connect_blocking
from queue_service.exceptions import message, rendered
from queue_service.logs import get_logger
from queue_service.runs import settling
from queue_service.runs.model import Ending, Return, Run
from queue_service.runs.queries import Claimant
from queue_service.services.loop import Service, Services, Work
from queue_service.settings import Settings
from queue_service.worker.claimer import Claimer
from queue_service.worker.dump import Dump
from queue_service.worker.endpoint import Endpoint
from queue_service.worker.executor import Executor
from queue_service.worker.finisher import Finisher
from queue_service.worker.handlers.context import HandlerContexts
from queue_service.worker.handlers.processes import Processes
from queue_service.worker.handlers.threads import Threads
from queue_service.worker.health import Health
from queue_service.worker.keeper import Keeper
from queue_service.worker.lag import LagWatch
from queue_service.worker.leases import Leases
from queue_service.worker.maintenance import Maintenance
from queue_service.worker.suspect_process import SuspectProcess

log = get_logger(__name__)

# How long handlers that were cancelled get to end, and then the tasks that they run in.
END_SECONDS, SLOT_SECONDS = 2.0, 0.5
# How long endings wait for what another session has locked, before those that need it are set aside.
MAX_LOCK_WAIT = timedelta(seconds=1)
# What endings are written in, so that a statement that is too slow is given up for a smaller one.
MAX_WRITE = timedelta(seconds=30)


class Parts:
    """Made on the event loop, and in the task, that `run` runs in."""

    def __init__(
        self,
        app: App,
        settings: Settings,
        worker_id: int,
        *,
        queues: Mapping[str, int],
        processes: int,
        name: str,
        endpoint: Endpoint | None,
        suspect_command: Sequence[str] | None,
        only_suspects: bool,
    ) -> None:
        self._settings = settings
        self._worker_id = worker_id
        self._address = app.address
        self.services = Services()
        # Asked for here: from the keeper's thread the App is not to be reached.
        self._app_services = app.opened.services
        self._life = asyncio.current_task()
        self._threads = Threads(on_change=self._threads_changed)
        self._processes = Processes(processes, address=app.address, worker_id=worker_id, settings=settings)
        # The claimer reads it at each claim; tasks that cannot be begun now are not in it.
        self._claimable = sorted(app.tasks)
        self._claiming = app.pool.reserved(None)
        self._finishing = app.pool.reserved(_for_endings(settings.lease))
        leases = Leases()
        self.finisher = Finisher(
            self._finishing, leases, worker_id, announce=self._announce, free=self._free, handed_back=self._handed_back
        )
        self._app = app
        self._leases = leases
        self.executors = {queue: self._executor(queue, concurrency) for queue, concurrency in queues.items()}
        self._suspect_process = SuspectProcess(suspect_command)
        self.claimer = self._make_claimer(only_suspects=only_suspects)
        self._keeper = Keeper(
            app.address, leases, worker_id, lease=settings.lease, poll_interval=settings.poll_interval,
            on_lost=self._lose, on_cancel=self._cancel, on_fleet=self.claimer.learn, failing=self._failing,
        )  # fmt: skip
        self.contexts = HandlerContexts(app, self.executors, worker_id=worker_id, settings=settings)
        self._lag = LagWatch(self._run_of)
        self._maintenance = Maintenance(app, settings)
        self._slots: set[asyncio.Task[None]] = set()
        self._listener = app.opened.listener
        self._endpoint = endpoint
        poll = settings.poll_interval.total_seconds()
        self._health = Health(
            self.claimer, self._listener, app.pool, self._all_services, poll_interval=poll, worker=name
        )
        self.dump = Dump(app.tasks, self.executors.values(), self._slots, self._threads, self._processes)

    async def run(self, *, once: bool, stop: asyncio.Event, stop_now: asyncio.Event) -> None:
        """Work until `stop`, or with `once` until nothing is due, and then drain; `stop_now` ends the draining."""
        await self._maintenance.begin(once=once)
        try:
            claiming = self._begin(once=once)
            finishing = self.services.ensure("finisher", self.finisher.run)
            try:
                await _first(claiming.has_returned.wait(), stop.wait())
                await self._drain(stop_now)
                await claiming.has_returned.wait()
                self.finisher.close()
                await finishing.has_returned.wait()
            except asyncio.CancelledError:
                # Everything may have been cancelled, as when the event loop ends.
                await self._leave_at_once()
                raise
        finally:
            await self._close()

    def _begin(self, *, once: bool) -> Service:
        """Start all parts but the finisher. Returns the claimer."""
        works: dict[str, Work] = {
            "keeper": self._keeper.run,
            "lag watch": lambda _: self._lag.run(),
            "reports": lambda _: self.contexts.reports.run(),
            "notices of runs": self._listen,
            **self._maintenance.works(),
        }
        if self._endpoint is not None:
            endpoint = self._endpoint
            works["health"] = lambda _: self._health.run(endpoint)
        if self._suspect_process.is_possible:
            works["suspects"] = self._suspect_process.run
        for name, work in works.items():
            self.services.ensure(name, work)
        return self.services.ensure("claimer", functools.partial(self.claimer.run, once=once))

    def abandon(self) -> None:
        """As Worker says."""
        entries = self.finisher.unwritten()
        for executor in self.executors.values():
            entries += executor.give_up()
            entries += [(held, Return(held.run.claim)) for held in executor.take_back()]
        outcomes = [outcome for _, outcome in entries if outcome is not None]
        leases = sorted({held.lease.id for held, _ in entries})
        log.error("this worker ends though handlers go on; their runs are given up", runs=len(outcomes))
        handed_on = [outcome for outcome in outcomes if isinstance(outcome, Ending) and outcome.handed_on]
        endings = [outcome for outcome in outcomes if isinstance(outcome, Ending) and not outcome.handed_on]
        returns = [outcome for outcome in outcomes if isinstance(outcome, Return)]
        with translated(), connect_blocking(self._address, application="queue_service leaving") as conn:
            fetch_sync(conn, settling.give_back(returns, worker_id=self._worker_id))
            fetch_sync(conn, settling.hand_on(handed_on, worker_id=self._worker_id))
            fetch_sync(conn, settling.finish(endings, worker_id=self._worker_id, freed=leases))

    async def _close(self) -> None:
        for executor in self.executors.values():
            executor.closing = True
        for slot in self._slots:
            slot.cancel()
        await self._suspect_process.close()
        await self.services.close()
        if self._slots:
            # One whose handler does not end is left to itself.
            await asyncio.wait(self._slots, timeout=SLOT_SECONDS)
        self._threads.close()
        await self._processes.close()
        self.contexts.close()
        self._claiming.leave()
        self._finishing.leave()

    def _executor(self, queue: str, concurrency: int) -> Executor:
        return Executor(
            queue,
            concurrency,
            tasks=self._app.tasks,
            fetch=self._app.fetch,
            finisher=self.finisher,
            threads=self._threads,
            processes=self._processes,
            reported=self._reported,
            result_limit=self._settings.payload_limit,
            spawn=self._spawn,
            room=self._wake_claimer,
            is_cancelled=self._is_cancelled,
        )

    def _make_claimer(self, *, only_suspects: bool) -> Claimer:
        final = sorted(name for name, task in self._app.tasks.items() if task.on_lost == "fail")
        return Claimer(
            self._claiming,
            self.executors,
            self._leases,
            self.finisher,
            Claimant(self._claimable, self._worker_id, self._settings.lease, self._app.identity, final),
            poll_interval=self._settings.poll_interval,
            only_suspects=only_suspects,
            suspects_elsewhere=self._suspect_process.need if self._suspect_process.is_possible else None,
            call_others=self._call_others,
        )

    async def _drain(self, stop_now: asyncio.Event) -> None:
        """Stop claiming, hand back what was not begun, wait for the handlers, then cancel those that are left."""
        self.claimer.stop()
        self._suspect_process.stop()
        for executor in self.executors.values():
            self.finisher.hand_back(executor.take_back())
        grace = self._settings.drain_timeout.total_seconds()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await _first(self._until_idle(), stop_now.wait())
        if beside := self._suspect_process.is_running:
            self._suspect_process.stop()
        interrupted = sum(executor.interrupt_all() for executor in self.executors.values())
        if interrupted:
            log.warning("handlers cancelled, since their time to end is over", runs=interrupted)
        if interrupted or beside:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_SECONDS):
                    await self._until_idle()
        self._give_up()

    def _give_up(self) -> None:
        given_up = [each for executor in self.executors.values() for each in executor.give_up()]
        for held, outcome in given_up:
            self.finisher.put(held, outcome)
        if given_up:
            log.error(
                "handlers go on although they were cancelled; their runs are given up. Let a cancellation pass, and wait "
                "for nothing in `finally` that may not come",
                runs=len(given_up),
            )

    async def _leave_at_once(self) -> None:
        """Hand back what is here, without any other part."""
        self.claimer.stop()
        await self.services.close()
        for executor in self.executors.values():
            self.finisher.hand_back(executor.take_back())
            executor.interrupt_all()
        self._give_up()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                await self.finisher.flush()

    async def _until_idle(self) -> None:
        def is_idle() -> bool:
            idle = all(executor.is_idle for executor in self.executors.values())
            return idle and not self._suspect_process.is_running

        while not is_idle():  # noqa: ASYNC110 - an event would cost each run
            await asyncio.sleep(0.005)

    async def _listen(self, service: Service) -> None:
        with self._listener.subscribed(channels.RUNS, channels.EVERY, channels.CANCEL) as notices:
            async for heard in notices:
                if isinstance(heard, NoticesMissed):
                    service.well()
                    self.claimer.rescan()
                elif heard.channel == channels.CANCEL:
                    self._cancel(channels.read_run_ids(heard.payload) or ())
                elif (where := channels.read_enqueued(heard.payload)) is not None:
                    rest = self.claimer.enqueued(*where, at_once=heard.channel == channels.EVERY)
                    if rest:
                        self._listener.rest(notices, rest)

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

    def _handed_back(self, queue: str, priority: int) -> None:
        # One that goes on leaves it to the poll: it may have been slow because all are.
        if self.claimer.is_stopping:
            self._call_others(queue, priority)

    def _call_others(self, queue: str, priority: int) -> None:
        self._app.notify([Notice(channels.EVERY, f"{priority} {queue}")])

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
        task = asyncio.create_task(slot, name="slot")
        self._slots.add(task)
        task.add_done_callback(self._slot_ended)
        return task

    def _slot_ended(self, slot: asyncio.Task[None]) -> None:
        self._slots.discard(slot)
        if not slot.cancelled() and (broken := slot.exception()) is not None:
            log.error("a slot has failed, and is replaced", why=message(broken), exception=rendered(broken))

    def _is_cancelled(self) -> bool:
        return self._life is not None and self._life.cancelling() > 0

    def _failing(self) -> list[str]:
        return sorted({each.name for each in self._all_services() if not each.condition.is_well})

    def _all_services(self) -> list[Service]:
        return [*self.services, *self._app_services]


def _for_endings(lease: timedelta) -> Limits:
    """The keeper may wait for what a statement here has locked, and must come in time."""
    return Limits(min(MAX_LOCK_WAIT, lease / 6), min(MAX_WRITE, lease / 3))


async def _first(*awaitables: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> None:
    """Return when one of them is done; those that were given as coroutines are then cancelled."""
    tasks = [each if isinstance(each, asyncio.Task) else asyncio.ensure_future(each) for each in awaitables]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task, given in zip(tasks, awaitables, strict=True):
            if task is not given:
                task.cancel()
