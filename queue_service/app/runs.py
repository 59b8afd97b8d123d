"""What an App does with runs: it enqueues them, waits for them, reads and changes them, on its own connections or on the
caller's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar

from queue_service.app import enqueue as enqueueing
from queue_service.app import history
from queue_service.app.core import Core
from queue_service.app.enqueue import OnConflict
from queue_service.app.history import Retried
from queue_service.app.progress import watching
from queue_service.db import channels
from queue_service.db.borrowed import borrow
from queue_service.db.execute import NOT_EXECUTED
from queue_service.db.steps import MAX_TRIES, Steps, can_copy, drive, drive_any
from queue_service.errors import ConfigError, DuplicateRun, RunUnknown
from queue_service.logs import get_logger
from queue_service.runs import queries
from queue_service.runs.model import NewRun, Progress, Run
from queue_service.services.combiner import Combiner
from queue_service.steps import queries as steps
from queue_service.tasks import duration

log = get_logger(__name__)

# Seconds between two tries to read what has ended.
READ_PAUSE = 0.1

T = TypeVar("T")


class Runs:
    """The part of an App that is about runs."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._enqueuing: Combiner[NewRun, int] = Combiner(
            self._enqueue, name="enqueue", weigh=lambda new: len(new.payload) + len(new.metadata or "")
        )

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
        among the queue's live runs of one organization, or of none; `on_conflict` says what a second enqueue does: `return`
        the live run's id, `replace` what is still queued, or `raise` DuplicateRun (as `replace` does when that run is
        running). Without an `organization_id` the run is of that of the database session, if it has one.
        With `conn`, a psycopg or SQLAlchemy connection or session, the run is part of the caller's transaction; nothing
        that happens here aborts it. Raises PayloadRefused and ConfigError before anything is sent.
        """
        enqueueing.check_policy(on_conflict)
        new = enqueueing.new_run(
            self._core.tasks, self._core.settings.payload_limit, task, payload,
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
        if conn is not None and not await can_copy(borrow(conn)):
            raise ConfigError(
                "enqueue_many copies its runs in, which psycopg does not do in pipeline mode. Leave the pipeline first, or "
                "enqueue them one by one."
            )
        first, texts = enqueueing.new_runs(self._core.tasks, self._core.settings.payload_limit, task, payloads, options)
        return await self._store(lambda notice: enqueueing.enqueue_many(first, texts, notice), first, conn)

    async def wait(
        self,
        run_id: int,
        *,
        timeout: timedelta | float | None = None,
        on_progress: Callable[[Progress], object] | None = None,
    ) -> Run:
        """Wait until the run has ended, and return it. Raises TimeoutError after `timeout`, RunUnknown for an id nobody
        has. `on_progress` is called with what the run reports, as often as a look each poll interval finds something new;
        what it raises is raised here."""
        ended = self.wait_many([run_id], timeout=timeout)
        if on_progress is not None:
            seconds = self._core.settings.poll_interval.total_seconds()
            ended = watching(ended, lambda: self.get(run_id), on_progress, poll_interval=seconds)
        (run,) = await ended
        return run

    async def wait_many(self, run_ids: Iterable[int], *, timeout: timedelta | float | None = None) -> list[Run]:
        """Wait until all of these runs have ended, and return them in the order asked for; also through an outage of the
        database. Raises TimeoutError after `timeout`, RunUnknown for an id nobody has, DatabaseUnavailable where the App is
        closed meanwhile. One look serves them all, however many they are."""
        asked = list(run_ids)
        seconds = None if timeout is None else duration(timeout, "timeout").total_seconds()
        ended: dict[int, Run] = {}
        try:
            async with asyncio.timeout(seconds):
                with self._core.opened.sweeping():
                    while left := set(asked) - ended.keys():
                        states = await self._core.opened.endings.wait(left)
                        if unknown := [run_id for run_id, state in states.items() if state is None]:
                            raise RunUnknown(min(unknown))
                        try:
                            found = await self._core.fetch(queries.get_many(left))
                        except NOT_EXECUTED as lost:
                            log.debug("cannot read runs that have ended; trying again", why=str(lost))
                            await asyncio.sleep(READ_PAUSE)
                            continue
                        # One that is missing or live was deleted, or queued again from history, between the two looks.
                        ended |= {run.id: run for run in found if run.state.finished}
        except TimeoutError:
            who = f"Run {asked[0]}" if len(asked) == 1 else f"One of {len(asked):,} runs"
            raise TimeoutError(f"{who} did not end within {seconds:g} s. It goes on; wait again.") from None
        return [ended[run_id] for run_id in asked]

    async def get(self, run_id: int, *, conn: Any = None) -> Run | None:
        """Return the run, live or finished; None if there is none of this id. With `conn`, what the caller's transaction
        sees."""
        recent = await self._core.fetch(queries.get_recent(run_id), conn)
        return recent or await self._core.fetch(queries.get(run_id), conn)

    async def cancel(self, run_id: int, *, conn: Any = None) -> bool:
        """Cancel a run: a queued one ends at once, a running one has its handler cancelled. Returns False if the run is
        not live. With `conn` it is part of the caller's transaction, which has the run until it ends."""
        answer = await self._core.fetch(queries.cancel(run_id), conn)
        if answer is not None:
            channel = channels.CANCEL if answer == "requested" else channels.FINISHED
            await self._core.announce([channels.about_runs(channel, [run_id])], conn)
        return answer is not None

    async def retry(self, run_id: int, *, conn: Any = None) -> bool:
        """Queue a failed, cancelled or expired run again, its counters fresh. Returns False if there is none of this id.
        Raises DuplicateRun if a live run holds its singleton key; then nothing moved. With `conn` it is part of the
        caller's transaction, which DuplicateRun leaves as it was."""
        for _ in range(MAX_TRIES):
            moved = await self._core.fetch(queries.retry(run_id), conn)
            if moved is None:
                return False
            if moved.has_moved:
                await self._core.announce([channels.enqueued(moved.queue, moved.priority)], conn)
                return True
            looking = queries.singleton_holder(moved.queue, moved.singleton_key or "", moved.organization_id)
            holder = await self._core.fetch(looking, conn)
            # None: it has ended since.
            if holder is not None:
                raise DuplicateRun(holder.run_id, moved.singleton_key or "", why="so this one was not queued again")
        are_shared = await self._core.fetch(queries.are_keys_shared(), conn)
        raise enqueueing.never_free(f"The singleton key of run {run_id}", are_shared=are_shared)

    async def retry_many(
        self,
        *,
        state: str = "failed",
        queue: str | None = None,
        task: str | None = None,
        since: datetime | timedelta | float | None = None,
        limit: int | None = None,
        dry_run: bool = False,
        on_progress: Callable[[Retried], object] | None = None,
        conn: Any = None,
    ) -> Retried:
        """Queue all runs again that ended `failed` (or `cancelled`, or `expired`), those of a queue, a task, and that ended
        since a time or within so long (timedelta or seconds), where that is given; the oldest first, at most `limit`. One
        whose singleton key a live run holds is skipped, and counted. `dry_run` counts them and moves none, up to 50,001.
        It is done in batches, and `on_progress` is called after each with what was done so far. Runs that fail after this
        began are left alone. It may be stopped and begun again at any time, and called from many places at once. With
        `conn`, all of it is part of the caller's transaction.
        """
        chosen = history.chosen(state, queue, task, since)
        how = history.count if dry_run else history.retry
        return await how(self._core, chosen, limit=limit, on_progress=on_progress or (lambda _: None), conn=conn)

    async def delete(self, run_id: int, *, conn: Any = None) -> bool:
        """Forget a queued or finished run and its steps. Returns False if it is running, or if there is none of this id.
        With `conn` it is part of the caller's transaction."""
        is_gone = await self._core.fetch(queries.delete(run_id), conn)
        if is_gone:
            # Not before: of a run that is running they are needed. What is left where this fails, the pruner forgets.
            await self._core.fetch(steps.forget(run_id), conn)
        return is_gone

    async def _enqueue(self, news: Sequence[NewRun]) -> Sequence[int]:
        """Store the runs of callers that came together."""
        if len(news) == 1:
            return [await self._store(lambda notice: enqueueing.enqueue(news[0], "return", notice), news[0], None)]
        ids = await self._core.fetch(queries.enqueue_all(news))
        self._core.notify([notice for new in news if (notice := enqueueing.notice(new)) is not None])
        return ids

    async def _store(self, store: Callable[[channels.Notice | None], Steps[T]], new: NewRun, conn: Any) -> T:
        notice = enqueueing.notice(new)
        if conn is not None:
            return await drive_any(store(notice), borrow(conn))
        opened = self._core.opened
        is_sent_along = notice is not None and opened.notifier.try_reserve(notice.channel)
        stored = await drive(store(notice if is_sent_along else None), opened)
        if notice is not None and not is_sent_along:
            opened.notifier.send([notice])
        return stored
