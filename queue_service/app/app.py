"""The object users hold: it registers tasks, and enqueues and follows runs, on its own connections or on the caller's."""

from __future__ import annotations

import asyncio
import copy
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar, overload

from psycopg import errors as pg

from queue_service import settings as settings_module
from queue_service.app import enqueue as enqueueing
from queue_service.app import history
from queue_service.app.enqueue import OnConflict, Steps, drive, drive_sync
from queue_service.app.events import Events
from queue_service.app.history import Retried
from queue_service.app.opened import Opened
from queue_service.app.progress import watching
from queue_service.app.queues import Queues
from queue_service.app.schedules import MisfireWord, Schedules, TaskT
from queue_service.app.turns import Turns
from queue_service.db import channels, url
from queue_service.db.borrowed import borrow
from queue_service.db.pool import Pool
from queue_service.db.query import Query
from queue_service.errors import ConfigError, DuplicateRun, RunUnknown
from queue_service.runs import queries
from queue_service.runs.model import NewRun, Progress, Run
from queue_service.schedules.model import NewSchedule
from queue_service.services.combiner import Combiner
from queue_service.settings import Settings
from queue_service.tasks import BatchDecorator, Decorator, OnLost, Retry, Task, Tasks, duration

if TYPE_CHECKING:
    from queue_service.app.sync import SyncApp

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class App:
    """Tasks and a database.

    `database` is a Postgres URL or conninfo, or `file:PATH` (or a path) for an embedded cluster there; without it the
    environment decides, and the embedded cluster in the data directory comes last. Nothing is connected before
    `async with app` (or `with app.sync`).
    """

    def __init__(self, database: str | None = None, *, settings: Settings | None = None) -> None:
        self.settings = settings or settings_module.load(os.environ)
        self.database = url.choose(database, os.environ, self.settings.data_dir)
        self.tasks = Tasks()
        self.declared: dict[str, NewSchedule] = {}
        # Names this process among those that hold connections; a process that starts again is another one.
        self.identity = uuid.uuid4().hex
        self._assemble()

    def _assemble(self) -> None:
        """What belongs to this object alone, and to one event loop."""
        self.turns = Turns(self)
        self.events = Events(self)
        self.queues = Queues(self)
        self.schedules = Schedules(self)
        self._enqueuing: Combiner[NewRun, int] = Combiner(
            self._enqueue, name="enqueue", weigh=lambda new: len(new.payload) + len(new.metadata or "")
        )
        self._open: Opened | None = None
        self._users = 0

    def _twin(self) -> App:
        """An App for the same database with the same tasks, and connections of its own."""
        twin = copy.copy(self)
        App._assemble(twin)
        return twin

    # Tasks

    @overload
    def task(self, function: Callable[P, Any], /) -> Task[P, Any]: ...
    @overload
    def task(
        self,
        function: None = ...,
        /,
        *,
        queue: str = ...,
        name: str | None = ...,
        timeout: timedelta | float | None = ...,
        retry: Retry | None = ...,
        process: bool = ...,
        on_lost: OnLost = ...,
    ) -> Decorator: ...
    @overload
    def task(
        self,
        function: None = ...,
        /,
        *,
        batch: int,
        queue: str = ...,
        name: str | None = ...,
        timeout: timedelta | float | None = ...,
        retry: Retry | None = ...,
        on_lost: OnLost = ...,
    ) -> BatchDecorator: ...
    def task(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        queue: str = "default",
        name: str | None = None,
        timeout: timedelta | float | None = None,
        retry: Retry | None = None,
        process: bool = False,
        batch: int | None = None,
        on_lost: OnLost = "retry",
    ) -> Any:
        """Register a function as a task, under its own name unless `name` says another. The name is what is stored: keep
        it when the function moves. `timeout` bounds one attempt; `retry` says how often a raising handler is tried, and
        when. With `process`, for a plain function at the top of its module, each run has a process of the worker's to
        itself; JSON goes in and out, and a process that dies is only that attempt's failure. With `batch`, the handler
        takes a list of up to so many runs, and returns None, or what becomes of each. With `on_lost="fail"`, a run that was
        claimed and whose worker was lost, or stopped it, ends `failed` instead of being tried again: with
        `Retry(max_attempts=1)` its handler is begun at most once.
        """
        if retry is not None and not isinstance(retry, Retry):
            raise ConfigError(f"retry must be a Retry, such as Retry(max_attempts=5), not {retry!r}.")

        def register(function: Callable[..., Any]) -> Task[..., Any]:
            task: Task[..., Any] = Task(
                function,
                name=name or function.__name__,
                queue=queue,
                timeout=None if timeout is None else duration(timeout, "timeout", positive=True),
                retry=retry or Retry(),
                enqueue=self.enqueue,
                process=process,
                batch=batch,
                on_lost=on_lost,
            )
            self.tasks.add(task)
            return task

        return register if function is None else register(function)

    def schedule(
        self,
        cron: str | None = None,
        /,
        *,
        every: timedelta | float | None = None,
        timezone: str = "UTC",
        misfire: MisfireWord = "last",
        payload: Mapping[str, Any] | None = None,
        queue: str | None = None,
        priority: int = 0,
        expires_in: timedelta | float | None = None,
        name: str | None = None,
    ) -> Callable[[TaskT], TaskT]:
        """Above `@app.task`: declare that a task is to run by itself, as `app.schedules.put` says, under the task's own
        name unless `name` says another. A worker stores what is declared when it starts.
        """
        options = {"every": every, "timezone": timezone, "misfire": misfire, "queue": queue, "priority": priority}
        return self.schedules.declare(cron, name, payload, {**options, "expires_in": expires_in})

    # Opening and closing

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect. An embedded cluster is started, and migrated if it is new. Raises DatabaseUnavailable, SchemaMismatch,
        EmbeddedUnavailable. Each `open` needs its `close`; only the first and the last do anything.
        """
        if self._open is None:
            self._open = await Opened.at(self.database, self.settings)
        self._users += 1

    async def close(self) -> None:
        """Let go of the connections and of the embedded cluster, once this was called as often as `open`."""
        self._users -= 1
        if self._users <= 0 and self._open is not None:
            opened, self._open, self._users = self._open, None, 0
            await opened.close()

    @property
    def sync(self) -> SyncApp:
        """The same methods, blocking, for code without an event loop: `with app.sync as q: q.enqueue(…)`."""
        from queue_service.app.sync import SyncApp

        return SyncApp(self._twin())

    @property
    def conninfo(self) -> str:
        """How to reach the database this App is connected to."""
        return self.opened.conninfo

    async def fetch(self, query: Query[T]) -> T:
        """Run one query on a connection of the pool."""
        return await self.opened.pool.fetch(query)

    @property
    def pool(self) -> Pool:
        return self.opened.pool

    # Runs

    async def enqueue(
        self,
        task: str,
        payload: Mapping[str, Any],
        /,
        *,
        queue: str | None = None,
        priority: int = 0,
        delay: timedelta | float | None = None,
        run_at: datetime | None = None,
        expires_in: timedelta | float | None = None,
        singleton_key: str | None = None,
        on_conflict: OnConflict = "return",
        ordering_key: str | None = None,
        max_attempts: int | None = None,
        retry_delay: timedelta | float | None = None,
        timeout: timedelta | float | None = None,
        metadata: Mapping[str, Any] | None = None,
        organization_id: str | None = None,
        conn: Any = None,
    ) -> int:
        """Store a run and return its id.

        `delay` (or `run_at`, with a time zone) says when it is due, `expires_in` how long after that it may still start.
        Higher `priority` goes first, -32768 to 32767. Durations are `timedelta` or seconds. A `singleton_key` is unique
        among the queue's live runs; `on_conflict` says what a second enqueue does: `return` the live run's id, `replace`
        what is still queued, or `raise` DuplicateRun (as `replace` does when the run is already running).
        With `conn`, a psycopg or SQLAlchemy connection or session, the run is part of the caller's transaction; nothing
        that happens here aborts it. Raises PayloadRefused and ConfigError before anything is sent.
        """
        enqueueing.check_policy(on_conflict)
        new = enqueueing.new_run(
            self.tasks, self.settings.payload_limit, task, payload,
            queue=queue, priority=priority, delay=delay, run_at=run_at, expires_in=expires_in,
            singleton_key=singleton_key, ordering_key=ordering_key, max_attempts=max_attempts,
            retry_delay=retry_delay, timeout=timeout, metadata=metadata, organization_id=organization_id,
        )  # fmt: skip
        if conn is None and singleton_key is None:
            return await self._enqueuing(new)
        return await self._store(lambda notice: enqueueing.enqueue(new, on_conflict, notice), new, conn)

    async def enqueue_many(
        self, task: str, payloads: Iterable[Mapping[str, Any]], /, *, conn: Any = None, **options: Any
    ) -> list[int]:
        """Store one run for each payload, all or none, and return their ids in order. Takes the options of `enqueue` that
        can be shared (not `singleton_key`). About twenty times quicker than one by one.
        """
        first, texts = enqueueing.new_runs(self.tasks, self.settings.payload_limit, task, payloads, options)
        return await self._store(lambda notice: enqueueing.enqueue_many(first, texts, notice), first, conn)

    async def wait(
        self,
        run_id: int,
        *,
        timeout: timedelta | float | None = None,
        on_progress: Callable[[Progress], object] | None = None,
    ) -> Run:
        """The run once it has ended. Raises TimeoutError after `timeout`, RunUnknown for an id nobody has. `on_progress` is
        called with what the run reports, as often as a look each poll interval finds something new; what it raises is
        raised here."""
        ended = self.wait_many([run_id], timeout=timeout)
        if on_progress is not None:
            seconds = self.settings.poll_interval.total_seconds()
            ended = watching(ended, lambda: self.get(run_id), on_progress, poll_interval=seconds)
        (run,) = await ended
        return run

    async def wait_many(self, run_ids: Iterable[int], *, timeout: timedelta | float | None = None) -> list[Run]:
        """The runs once all of them have ended, in the order asked for. Raises TimeoutError after `timeout`, RunUnknown for
        an id nobody has. One look serves them all, however many they are."""
        asked = list(run_ids)
        seconds = None if timeout is None else duration(timeout, "timeout").total_seconds()
        ended: dict[int, Run] = {}
        try:
            async with asyncio.timeout(seconds):
                with self.opened.sweeping():
                    while left := set(asked) - ended.keys():
                        states = await self.opened.endings.wait(left)
                        if unknown := [run_id for run_id, state in states.items() if state is None]:
                            raise RunUnknown(min(unknown))
                        # One that is missing or live was deleted, or queued again from history, between the two looks.
                        found = await self.fetch(queries.get_many(left))
                        ended |= {run.id: run for run in found if run.state.finished}
        except TimeoutError:
            who = f"Run {asked[0]}" if len(asked) == 1 else f"One of {len(asked):,} runs"
            raise TimeoutError(f"{who} did not end within {seconds:g} s. It goes on; wait again.") from None
        return [ended[run_id] for run_id in asked]

    async def get(self, run_id: int) -> Run | None:
        """The run, live or finished; None if there is none of this id."""
        return await self.fetch(queries.get(run_id))

    async def cancel(self, run_id: int) -> bool:
        """Cancel a run: a queued one ends at once, a running one has its handler cancelled. False: it is not live."""
        answer = await self.fetch(queries.cancel(run_id))
        if answer is not None:
            channel = channels.CANCEL if answer == "requested" else channels.FINISHED
            self.opened.notifier.send([channels.about_runs(channel, [run_id])])
        return answer is not None

    async def retry(self, run_id: int) -> bool:
        """Queue a failed, cancelled or expired run again, its counters fresh. False: there is none of this id.
        Raises DuplicateRun if a live run holds its singleton key; then nothing moved.
        """
        try:
            where = await self.fetch(queries.retry(run_id))
        except pg.UniqueViolation:
            run = await self.fetch(queries.get(run_id))
            if run is None or run.singleton_key is None:
                return False
            holder = await self.fetch(queries.singleton_holder(run.queue, run.singleton_key))
            raise DuplicateRun(holder or run_id, run.singleton_key, why="so this one was not queued again") from None
        if where is not None:
            self.opened.notifier.send([channels.enqueued(*where)])
        return where is not None

    async def retry_many(
        self,
        *,
        state: str = "failed",
        queue: str | None = None,
        task: str | None = None,
        since: datetime | timedelta | float | None = None,
        limit: int | None = None,
        dry_run: bool = False,
        told: Callable[[Retried], object] | None = None,
    ) -> Retried:
        """Queue all runs again that ended `failed` (or `cancelled`, or `expired`), those of a queue, a task, and that ended
        since a time or within so long (timedelta or seconds), where that is given; the oldest first, at most `limit`. One
        whose singleton key a live run holds is skipped, and counted. `dry_run` counts them and moves none, up to 50,001.
        It is done in batches, `told` is called after each, and what fails after this began is left alone: stop and begin
        again whenever you like, and from many places at once.
        """
        chosen = history.chosen(state, queue, task, since)
        how = history.count if dry_run else history.retry
        return await how(self.opened, chosen, limit=limit, told=told or (lambda _: None))

    async def delete(self, run_id: int) -> bool:
        """Forget a queued or finished run. False: it is running, or there is none of this id."""
        return await self.fetch(queries.delete(run_id))

    def notify(self, notices: Iterable[channels.Notice]) -> None:
        """Send notices soon, coalesced with those of the rest of this process."""
        self.opened.notifier.send(list(notices))

    async def _enqueue(self, news: Sequence[NewRun]) -> Sequence[int]:
        """Store the runs of callers that came together."""
        if len(news) == 1:
            return [await self._store(lambda notice: enqueueing.enqueue(news[0], "return", notice), news[0], None)]
        ids = await self.fetch(queries.enqueue_all(news))
        self.opened.notifier.send([told for new in news if (told := enqueueing.notice(new)) is not None])
        return ids

    async def _store(self, store: Callable[[channels.Notice | None], Steps[T]], new: NewRun, conn: Any) -> T:
        notice = enqueueing.notice(new)
        if conn is None:
            notifier = self.opened.notifier
            rides = notice is not None and notifier.may_ride(notice.channel)
            stored = await drive(store(notice if rides else None), self.opened)
            if notice is not None and not rides:
                notifier.send([notice])
            return stored
        borrowed = borrow(conn)
        steps = store(notice)
        return await drive(steps, borrowed) if borrowed.is_async else drive_sync(steps, borrowed)

    @property
    def opened(self) -> Opened:
        """What this App holds while it is open. ConfigError while it is not, after a fork, or on another event loop."""
        if self._open is None:
            raise ConfigError("This App is not connected. Use it inside `async with app:` (or `with app.sync as q:`).")
        self._open.check_caller()
        return self._open
